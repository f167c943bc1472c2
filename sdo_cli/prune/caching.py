"""Learning-to-Cache (Ma et al. 2024, arXiv 2406.01733): every other call is whole, and in between gates say which units
take their output from it."""

from functools import partial

import torch
from torch import Tensor

from sdo_cli.prune.gated import gated_call
from sdo_cli.prune.setting import Setting
from sdo_cli.sampling.loop import denoise_path
from sdo_cli.seeding import keyed_generator
from sdo_cli.skipping.walking import Stored

# logits stay within
MOST = 5.0
# ahead of any logit: what is always computed is kept first
ALWAYS = 100.0


def soft_gates(ahead: Tensor) -> Tensor:
    """``[calls, units]``: sigmoid of the logits ``ahead``; 1 at every other call, from the first."""
    gates = torch.sigmoid(ahead)
    return torch.where(whole_calls(len(ahead))[:, None].to(gates.device), torch.ones_like(gates), gates)


def whole_calls(calls: int) -> Tensor:
    """``[calls]`` bool."""
    return torch.arange(calls) % 2 == 0


def cached_update(setting: Setting, live_calls: int, number: int, gates: Tensor, sample: int, batch: int) -> float:
    """Squared error of single outputs under soft gates, the other units' outputs taken from the call before, at the
    latents of the full path; mean over elements, summed over calls, unweighted.

    Args:
        live_calls: how many calls are looked at; each counts for as many as there are over these.
        gates: ``[calls, units]``; their gradient is added to ``gates.grad``.
    """
    path, modules = setting.update_path(number, batch, sample), setting.family.skippable(setting.grain)
    between = (~whole_calls(setting.calls)).nonzero()[:, 0].tolist()
    generator = keyed_generator(setting.seed, "prune-live", number, sample)
    chosen = {between[k] for k in torch.randperm(len(between), generator=generator)[:live_calls].tolist()}
    kept: dict[int, tuple[Tensor, Tensor, Stored]] = {}
    outputs: dict[int, Tensor] = {}
    stored = Stored()

    def call(i: int, x: Tensor, t: Tensor) -> Tensor:
        nonlocal stored
        if i + 1 in chosen:
            e, stored = gated_call(modules, lambda: path.denoise(x, t, path.rows), {}, Stored())
            return e
        outputs[i] = path.denoise(x, t, path.rows)
        if i in chosen:
            kept[i] = (x, t, stored)
        return outputs[i]

    with torch.no_grad():
        denoise_path(path, call)
    total = 0.0
    for i, (x, t, before) in sorted(kept.items()):
        here = dict(zip(setting.wiring.units, gates[i], strict=True))
        with torch.enable_grad():
            e, _ = gated_call(modules, partial(path.denoise, x, t, path.rows), here, before)
            error = len(between) / len(chosen) * (e - outputs[i]).square().mean()
            error.backward()
        total += error.item()
    return total
