"""Finds the wiring of a network by watching one call: nothing is assumed about its architecture."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sdo_cli.skipping.liveness import Wiring
from sdo_cli.skipping.supernet import wrapped

# marks what comes from outside the units
INPUT = -1


class _Origins(TorchDispatchMode):
    """Keeps, for every tensor, the units (or :data:`INPUT`) it was made from."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()

    def of(self, tree: Any) -> frozenset[int]:
        return frozenset().union(*(self._known.get(tensor, ()) for tensor in _tensors(tree)))

    def mark(self, tree: Any, origins: frozenset[int]) -> None:
        for tensor in _tensors(tree):
            self._known[tensor] = origins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if origins := self.of((args, kwargs)):
            self.mark(result, origins | self.of(result))
        return result


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@torch.no_grad()
def observe(modules: Mapping[str, nn.Module], inputs: Sequence[Tensor], run: Callable[[], Tensor]) -> Wiring:
    """The wiring of the units ``modules`` in ``run``, which calls the network once on ``inputs``.

    Raises:
        ValueError: a unit did not run exactly once, so it cannot be skipped.
    """
    origins, order, reads = _Origins(), list[str](), dict[str, frozenset[int]]()

    def watching(name: str, compute: Callable[[], Any], given: Any) -> Any:
        number = len(order)
        order.append(name)
        reads[name] = origins.of(given) - {INPUT}
        result = compute()
        origins.mark(result, frozenset({number}))
        return result

    with origins, wrapped(modules, watching):
        origins.mark(inputs, frozenset({INPUT}))
        reached = origins.of(run())
    if sorted(order) != sorted(modules):
        wrong = sorted({name for name in modules if order.count(name) != 1})
        raise ValueError(f"these do not run once per network call and cannot be skipped: {', '.join(wrong)}")
    return Wiring(tuple(order), tuple(reads[name] for name in order), reached - {INPUT}, INPUT in reached)
