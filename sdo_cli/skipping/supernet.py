"""The network with a switch at every unit, over unchanged diffusers modules: only their ``forward`` is wrapped."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

# decide(unit, compute, given) -> the unit's output; ``given`` are its arguments
Decide = Callable[[str, Callable[[], Any], Any], Any]


@contextmanager
def wrapped(modules: Mapping[str, nn.Module], decide: Decide) -> Iterator[None]:
    """Within, every call of a unit goes through ``decide``; afterwards the modules are as they were."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = _through(name, module.forward, decide)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if (own := before[name]) is not None:
                module.forward = own


def _through(name: str, forward: Callable[..., Any], decide: Decide) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return decide(name, lambda: forward(*args, **kwargs), (args, kwargs))

    return call


def on_tensors(change: Callable[..., Tensor], *trees: Any) -> Any:
    """``change`` on the tensors of outputs of one unit; what else is in them (None) is the first one's."""
    return tree_map(lambda *leaves: change(*leaves) if isinstance(leaves[0], Tensor) else leaves[0], *trees)
