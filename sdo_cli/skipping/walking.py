"""Walks a skip plan: what is computed is stored, what is skipped hands out what was stored last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.skipping.supernet import on_tensors, wrapped

Parts = tuple[Tensor, ...]
# unit → output
Stored = dict[str, Any]


@dataclass(frozen=True)
class Skips:
    """A plan with the modules it switches.

    Attributes:
        modules: the network's units by name.
        exact: gradients are those of the pruned sampler: live calls are computed ones, run again with the same units
            skipped. Else the whole network is run again at any call.
    """

    plan: SkipPlan
    modules: Mapping[str, nn.Module]
    exact: bool = False

    def begin(self, *, store_all: bool = False) -> "Walk":
        """For one batch on its way from noise to the image.

        Args:
            store_all: also outputs that no later call reads.
        """
        return Walk(self, store_all)

    def again(self, i: int, kept: Sequence[Stored]) -> Any:
        """A context in which the network runs as at call ``i``, for samples that stored ``kept``."""
        stored = {
            unit: on_tensors(lambda *parts: torch.stack(parts, 1).flatten(0, 1), *(one[unit] for one in kept))
            for unit in (kept[0] if kept else ())
        }
        return self._at(i, stored, frozenset())

    def alike(self, i: int) -> tuple[bool, ...]:
        """Calls for which this is the same compute the same units."""
        return tuple(self.plan.runs[i].tolist())

    @contextmanager
    def _at(self, i: int, stored: Stored, keeps: frozenset[str]) -> Iterator[None]:
        computed = dict(zip(self.plan.wiring.units, self.plan.runs[i].tolist(), strict=True))

        def decide(unit: str, compute: Callable[[], Any], given: Any) -> Any:
            del given
            if not computed[unit]:
                return stored[unit]
            output = compute()
            stored[unit] = output if unit in keeps else on_tensors(_only_shape, output)
            return output

        with wrapped(self.modules, decide):
            yield


class Walk:
    """One batch's stored outputs, call by call."""

    def __init__(self, skips: Skips, store_all: bool) -> None:
        self.skips, self.stored, self._latest = skips, Stored(), tuple[Tensor, ...]()
        self._all = frozenset(skips.modules) if store_all else None

    def __call__(self, i: int, compute: Callable[[], Parts]) -> Parts:
        """What ``compute`` returns at call ``i``; it is not asked where the call repeats the one before."""
        self._forget(i)
        if not self.skips.plan.repeats[i]:
            with self.skips._at(i, self.stored, self._keeps(i)):
                self._latest = compute()
        return self._latest

    def _keeps(self, i: int) -> frozenset[str]:
        return self.skips.plan.keeps[i] if self._all is None else self._all

    def _forget(self, i: int) -> None:
        """What nobody reads from call ``i`` on; its shape is enough, as it may still be handed out."""
        for unit in self.stored.keys() - self._keeps(i - 1) if i else ():
            self.stored[unit] = on_tensors(_only_shape, self.stored[unit])

    def kept(self, i: int, sample: int, batch: int) -> Stored:
        """What sample ``sample`` of ``batch`` reads at call ``i`` of what was stored before; to be run again with.

        Outputs that nobody reads keep only their shape.
        """
        plan, kept = self.skips.plan, Stored()
        for number, unit in enumerate(plan.wiring.units):
            if bool(plan.runs[i, number]):
                continue
            take = _row if number in plan.reads[i] else _shape
            kept[unit] = on_tensors(lambda part, take=take: take(part, sample, batch), self.stored[unit])
        return kept


def _row(part: Tensor, sample: int, batch: int) -> Tensor:
    """``[branches, …]`` of a unit's output ``[branches · B, …]``: guidance puts both into one batch."""
    return part.unflatten(0, (-1, batch))[:, sample].clone()


def _shape(part: Tensor, sample: int, batch: int) -> Tensor:
    return _only_shape(part.unflatten(0, (-1, batch))[:, sample])


def _only_shape(part: Tensor) -> Tensor:
    return part.new_zeros(()).expand(part.shape)
