"""`torch.compile` for network calls without a graph: the rollouts, which are nearly all of an iteration."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault

# torch's modes that replay CUDA graphs, whose outputs the next replay overwrites
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compile_modules(modules: Iterable[nn.Module], mode: str, rows: int) -> None:
    """From now on calls of these modules without a graph and with ``rows`` samples are compiled.

    Any other call stays as it is: shapes that come once are not worth a minute of compiling, and a backward pass is one
    call in fifty. Weights may change; compiled code reads them anew.

    Args:
        mode: torch's: ``default``, ``reduce-overhead``, ``max-autotune``.
    """
    modules = list(modules)
    # torch counts what it compiled by lines of code, and units of one class share theirs; it gives up at eight
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(modules))
    for module in modules:
        module.forward = _where_it_pays(module.forward, mode, rows)


def _where_it_pays(plain: Callable[..., Any], mode: str, rows: int) -> Callable[..., Any]:
    compiled = torch.compile(plain, mode=mode, dynamic=False)

    def forward(*args: Any, **options: Any) -> Any:
        given = args[0] if args else options["hidden_states"]
        if torch.is_grad_enabled() or len(given) != rows:
            return plain(*args, **options)
        return _explained(compiled, mode, *args, **options)

    return forward


def _explained(compiled: Callable[..., Any], mode: str, *args: Any, **options: Any) -> Any:
    from torch._dynamo.exc import TorchDynamoException
    from torch.utils._pytree import tree_map

    try:
        if mode not in WITH_CUDA_GRAPHS or not torch.cuda.is_available():
            return compiled(*args, **options)
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, compiled(*args, **options))
    except TorchDynamoException as fault:
        first = str(fault).strip().splitlines()[0]
        raise EnvironmentFault(
            f"torch.compile could not compile the network: {first}",
            remedy="write compile: none; it needs a C++ compiler, and on GPUs Triton",
        ) from fault
