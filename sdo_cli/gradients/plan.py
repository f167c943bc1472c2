"""A gradient rule's whole decision, as data: at which network calls of which samples gradients flow."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Mode(IntEnum):
    """How gradients pass one network call. The solver's linear path is always kept."""

    FROZEN = 0  # the output is a constant
    WEIGHTS = 1  # graph through the weights, input detached
    THROUGH = 2  # graph through weights and input


@dataclass(frozen=True)
class Plan:
    """Attributes:
    mode: ``[calls, B]`` of :class:`Mode`, int64 on the CPU.
    weight: ``[calls, B]``, what the gradient through this call is multiplied with (1/p_i for an unbiased
        estimate of the sum over all calls).
    endpoint: ``[B]``, the call whose x0-prediction the reward sees; ``calls`` (the default) means ``x_N``.
        The rollout ends with the last call anybody needs.
    repeats: ``[n, B]`` seeds: for each row the last call is repeated on a re-noised ``sg(x_N)`` and the reward
        sees that x0-prediction too; all n + 1 are averaged (DRaFT-LV).
    as_epsilon: the linear path holds ε constant instead of the network's native output.
    nested: ``[calls, B]``, what the gradient that a THROUGH call sends on through the network to its input is
        multiplied with; None: 1. Beside the network the linear path is kept as it is.
    turn: ``[calls, B]``, which of several updates on one rollout each live call serves, from 0; None: there is one.
    whole: of a part, when all parts must make the same network calls: the plan it was cut from.
    """

    mode: Tensor
    weight: Tensor
    endpoint: Tensor | None = None
    repeats: Tensor | None = None
    as_epsilon: bool = False
    nested: Tensor | None = None
    turn: Tensor | None = None
    whole: "Plan | None" = None

    def __post_init__(self) -> None:
        if self.mode.shape != self.weight.shape or self.mode.dim() != 2:
            raise ValueError(f"mode {tuple(self.mode.shape)} and weight {tuple(self.weight.shape)} must be [calls, B]")
        # rules may be written by users: whatever number types they chose become ours
        object.__setattr__(self, "mode", self.mode.long())
        object.__setattr__(self, "weight", self.weight.double())
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError("a weight of the plan is not a finite number")
        if self.endpoint is not None and self.endpoint.shape != self.mode.shape[1:]:
            raise ValueError(f"endpoint {tuple(self.endpoint.shape)} must be [B] = [{self.batch}]")
        if self.repeats is not None and self.repeats.shape[1:] != self.mode.shape[1:]:
            raise ValueError(f"repeats {tuple(self.repeats.shape)} must be [n, B] with B = {self.batch}")
        if self.turn is not None and (self.turn.shape != self.mode.shape or self.repeats is not None):
            raise ValueError(f"turn {tuple(self.turn.shape)} must be {tuple(self.mode.shape)}, without repeats")
        if self.nested is not None:
            object.__setattr__(self, "nested", self.nested.double())
            if self.nested.shape != self.mode.shape or not bool(torch.isfinite(self.nested).all()):
                raise ValueError(f"nested {tuple(self.nested.shape)} must be finite, {tuple(self.mode.shape)}")
        if bool(((self.ends < 0) | (self.ends > self.calls)).any()):
            raise ValueError(f"endpoint must be in 0 … {self.calls}, which means x_N")
        after = torch.arange(self.calls)[:, None] > self.ends[None]
        if bool((self.live & after).any()):
            raise ValueError("a call after a sample's endpoint cannot be live: nothing it does reaches the reward")

    @property
    def calls(self) -> int:
        return self.mode.shape[0]

    @property
    def batch(self) -> int:
        return self.mode.shape[1]

    @property
    def live(self) -> Tensor:
        """``[calls, B]`` bool: where the network is run with a graph."""
        return self.mode != Mode.FROZEN

    @property
    def ends(self) -> Tensor:
        """``[B]``: the endpoint of every sample, ``calls`` for ``x_N``."""
        return torch.full((self.batch,), self.calls) if self.endpoint is None else self.endpoint

    @property
    def calls_run(self) -> int:
        """Network calls of the rollout; fewer than ``calls`` when every sample ends early."""
        return min(self.calls, int((self.whole or self).ends.max()) + 1)

    @property
    def last(self) -> int | None:
        """The call with which all parts in step end; None: each with the last that it needs."""
        return None if self.whole is None else int(self.whole.ends.max())

    @property
    def graphs(self) -> list[bool]:
        """``[calls]``: whether the network is run with a graph, for a sample of this part or of one in step."""
        found: list[bool] = (self.whole or self).live.any(1).tolist()
        return found

    @property
    def most_live(self) -> int:
        """Live (call, sample) pairs, of the part in step that has most."""
        return max(int(part.sum()) for part in (self.whole or self).live.split(self.batch, 1))

    def rows(self, rows: slice, *, in_step: bool = False) -> "Plan":
        """The plan of some samples of the batch.

        Args:
            in_step: make the same network calls as every other part of this size.
        """
        return replace(
            self,
            mode=self.mode[:, rows],
            weight=self.weight[:, rows],
            endpoint=None if self.endpoint is None else self.endpoint[rows],
            repeats=None if self.repeats is None else self.repeats[:, rows],
            nested=None if self.nested is None else self.nested[:, rows],
            turn=None if self.turn is None else self.turn[:, rows],
            whole=self if in_step else None,
        )

    def of_updates(self, first: int, last: int | None = None) -> "Plan":
        """With the live calls of updates ``first`` to ``last`` alone (of ``first`` by default); the same rollout."""
        if self.turn is None:
            return self
        mine = (self.turn >= first) & (self.turn <= (first if last is None else last))
        return replace(
            self,
            mode=torch.where(mine, self.mode, Mode.FROZEN),
            weight=torch.where(mine, self.weight, 0.0),
            # the rollout ends where all updates want it to
            turn=None,
            whole=None if self.whole is None else self.whole.of_updates(first, last),
        )

    def is_one_step_deep(self, *, latents: bool = False) -> bool:
        """True when no live call depends on an earlier live one: the three-stage engine serves it.

        A first live call may be THROUGH: nothing live stands before it, so its input carries no graph. When the
        starting ``latents``, injected noise or guidance are optimised every input but the first call's carries one.
        """
        if self.whole is not None:
            return self.whole.is_one_step_deep(latents=latents)
        through = self.mode == Mode.THROUGH
        if latents and bool(through[1:].any()):
            return False
        earlier_live = self.live.long().cumsum(0) - self.live.long()
        return not bool((through & (earlier_live > 0)).any())


# rule(calls, batch, coefficients, generator, options…) -> Plan
Rule = Callable[..., Plan]


def empty(calls: int, batch: int) -> tuple[Tensor, Tensor]:
    """All-FROZEN mode and zero weight, to be filled in by a rule."""
    return torch.zeros(calls, batch, dtype=torch.long), torch.zeros(calls, batch, dtype=torch.float64)


def plan_of(calls: int, batch: int, which: slice | list[int], mode: Mode, *, endpoint: int | None = None) -> Plan:
    """The same calls ``which`` of every sample in ``mode`` with weight 1; all samples end at ``endpoint``."""
    modes, weight = empty(calls, batch)
    modes[which], weight[which] = mode, 1.0
    return Plan(modes, weight, None if endpoint is None else torch.full((batch,), endpoint))
