"""Network calls with soft switches: what a search differentiates."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdo_cli.sampling.loop import Path, denoise_path
from sdo_cli.skipping.supernet import on_tensors, wrapped
from sdo_cli.skipping.walking import Stored


def gated_call(
    modules: Mapping[str, nn.Module], run: Callable[[], Tensor], gates: Mapping[str, Tensor], stored: Stored
) -> tuple[Tensor, Stored]:
    """``run()`` with every unit's output mixed with its stored one by its gate, and the outputs that came out.

    Args:
        gates: a scalar per unit, 1 its own output, 0 the stored one.
        stored: outputs of the call before; empty at the first call, whose gates mean nothing.
    """
    made = Stored()

    def decide(unit: str, compute: Callable[[], Any], given: Any) -> Any:
        del given
        made[unit] = compute()
        if unit in stored:
            gate = gates[unit]
            made[unit] = on_tensors(
                lambda new, old: gate.to(new) * new + (1 - gate).to(new) * old, made[unit], stored[unit]
            )
        return made[unit]

    with wrapped(modules, decide):
        return run(), made


def gated_latents(path: Path, modules: Mapping[str, nn.Module], units: tuple[str, ...], gates: Tensor) -> Tensor:
    """``x_N`` of the whole gated trajectory under autograd, each call recomputed in the backward pass.

    Args:
        gates: ``[calls, units]``, from 0 to 1.
    """
    rows, stored = path.rows, Stored()

    def call(i: int, x: Tensor, t: Tensor) -> Tensor:
        nonlocal stored
        here, before = dict(zip(units, gates[i], strict=True)), stored

        def run(x: Tensor) -> tuple[Tensor, Stored]:
            return gated_call(modules, lambda: path.denoise(x, t, rows), here, before)

        e, stored = checkpoint(run, x, use_reentrant=False)
        return e

    with torch.enable_grad():
        return denoise_path(path, call)
