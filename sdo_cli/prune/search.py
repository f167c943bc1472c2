"""DiP-GO's search: gates trained on prompts alone, the network as it is (Zhu et al. 2024, arXiv 2410.16942)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.prune.caching import ALWAYS, MOST, cached_update, soft_gates, whole_calls
from sdo_cli.prune.gated import gated_call, gated_latents
from sdo_cli.prune.gates import PRUNERS, straight_through
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.ssim import ssim
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import Path, denoise_path, sample_latents
from sdo_cli.seeding import keyed_generator
from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.skipping.supernet import on_tensors
from sdo_cli.skipping.walking import Skips, Stored

# differences of images [B, 3, H, W] in [0, 1], per image [B]
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ssim": lambda images, full: 1 - ssim(images, full),
    "l1": lambda images, full: (images - full).abs().flatten(1).mean(1),
    "l2": lambda images, full: (images - full).square().flatten(1).mean(1),
}
GRADIENTS = ("full", "shortcut", "one-step", "l2c")


@dataclass(frozen=True)
class SearchSettings:
    """Attributes:
    pruner: ``table`` or ``attention``.
    gradients: ``full`` backpropagates through the whole trajectory, ``shortcut`` through ``live_calls`` of its calls,
        ``one-step`` compares single outputs on the pruned path with those of the whole network, ``l2c`` those of every
        other call on the full path, with soft gates.
    distance: ``ssim``, ``l1`` or ``l2`` of decoded images; ``one-step`` compares outputs.
    batch: samples of an update; each is computed alone.
    sparsity: weight of the kept share of computation; dropped once that is below ``enough``.
    """

    pruner: str = "table"
    gradients: str = "full"
    distance: str = "ssim"
    updates: int = 500
    batch: int = 1
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    sparsity: float = 1.0
    enough: float = 0.2
    live_calls: int = 1


@dataclass(frozen=True)
class Update:
    """One update of a search.

    Attributes:
        scores: ``[calls, units]``, higher is kept sooner.
        state: what :func:`search` goes on from; to be put away before the next update.
    """

    number: int
    distance: float
    kept: float
    scores: Tensor
    state: dict[str, Any]


def search(
    setting: Setting, wanted: SearchSettings, *, world: World = SINGLE, state: dict[str, Any] | None = None
) -> Iterator[Update]:
    """Train the gates, one update after each result.

    Args:
        world: the processes that samples of an update are dealt out to; gates are the same on all of them, bit for bit.
        state: of an earlier update of the same search, which is gone on with.
    """
    units = setting.wiring.units
    pruner = PRUNERS[wanted.pruner](setting.calls, len(units)).to(setting.family.device)
    parameters = list(pruner.parameters())
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[wanted.optimizer]
    optimizer = make(parameters, lr=wanted.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, wanted.updates)
    if state is not None:
        pruner.load_state_dict(state["pruner"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    shares = setting.shares.to(setting.family.device)
    differentiate = {
        "full": full_update,
        "shortcut": shortcut_update,
        "one-step": one_step_update,
        "l2c": l2c_update,
    }[wanted.gradients]
    caching = wanted.gradients == "l2c"
    for number in range(0 if state is None else state["number"], wanted.updates):
        optimizer.zero_grad()
        gates = soft_gates(pruner()) if caching else straight_through(pruner())
        mine = {}
        for sample in filter(world.mine, range(wanted.batch)):
            leaf = gates.detach().requires_grad_()
            distance = differentiate(setting, wanted, number, leaf, sample)
            mine[sample] = distance, (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)).cpu()
        every = {sample: found for theirs in world.gather(mine) for sample, found in theirs.items()}
        kept = float((gates.detach().double() @ shares).mean())
        into, distance = every[0][1], every[0][0]
        for sample in range(1, wanted.batch):
            # in the order of the samples, whoever computed them: sums of floats depend on it
            into, distance = into + every[sample][1], distance + every[sample][0]
        into = into.to(gates) / wanted.batch
        if caching or kept >= wanted.enough:
            into = into + wanted.sparsity * shares.to(into)[None] / setting.calls
        gates.backward(into)
        optimizer.step()
        schedule.step()
        if caching:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.clamp_(-MOST, MOST)
        # a device may not add up alike twice
        world.make_same(parameters)
        now = {"pruner": pruner.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        scores = pruner().detach().cpu().clone()
        if caching:
            scores[whole_calls(setting.calls)] = ALWAYS
        yield Update(number + 1, distance / wanted.batch, kept, scores, {"number": number + 1, **now})


def full_update(setting: Setting, wanted: SearchSettings, number: int, gates: Tensor, sample: int = 0) -> float:
    """Gradient of the distance of the pruned image to the full one, through all calls, into ``gates.grad``."""
    path = setting.update_path(number, wanted.batch, sample)
    with torch.no_grad():
        full = setting.family.decode(sample_latents(path))
    latents = gated_latents(path, setting.family.skippable(setting.grain), setting.wiring.units, gates)
    distance = DISTANCES[wanted.distance](setting.family.decode(latents), full).mean()
    distance.backward()
    return distance.item()


@dataclass(frozen=True)
class KeptCall:
    """The input of a call on the pruned path and what all units had stored before it."""

    x: Tensor
    t: Tensor
    stored: Stored


@torch.no_grad()
def pruned_walk(
    path: Path, plan: SkipPlan, keep: set[int], modules: dict[str, torch.nn.Module]
) -> tuple[Tensor, dict[int, KeptCall]]:
    """``x_N`` under a plan, and the calls ``keep``."""
    walk, rows, kept = Skips(plan, modules).begin(store_all=True), path.rows, dict[int, KeptCall]()

    def call(i: int, x: Tensor, t: Tensor) -> Tensor:
        if i in keep:
            # a shallow copy: outputs are replaced, never changed
            kept[i] = KeptCall(x.clone(), t.clone(), dict(walk.stored))
        return walk(i, lambda: (path.denoise(x, t, rows),))[0]

    return denoise_path(path, call), kept


def _live_calls(setting: Setting, wanted: SearchSettings, number: int, sample: int) -> list[int]:
    """Calls of this sample: one of each of as many even strata, never the first, whose gates are fixed."""
    generator, k = keyed_generator(setting.seed, "prune-live", number, sample), wanted.live_calls
    edges = torch.linspace(1, setting.calls, k + 1, dtype=torch.float64)
    inside = torch.rand(k, generator=generator, dtype=torch.float64)
    return [int(a + u * (b - a)) for a, b, u in zip(edges[:-1], edges[1:], inside, strict=True)]


def shortcut_update(setting: Setting, wanted: SearchSettings, number: int, gates: Tensor, sample: int = 0) -> float:
    """The same gradient by shortcuts: of ``live_calls`` calls alone, the solver's linear path from there."""
    path, modules = setting.update_path(number, wanted.batch, sample), setting.family.skippable(setting.grain)
    plan, chosen = setting.plan(gates.detach().cpu() > 0.5), _live_calls(setting, wanted, number, sample)
    with torch.no_grad():
        full = setting.family.decode(sample_latents(path))
    x_N, kept = pruned_walk(path, plan, set(chosen), modules)
    leaf = x_N.requires_grad_()
    distance = DISTANCES[wanted.distance](setting.family.decode(leaf), full).mean()
    (g,) = torch.autograd.grad(distance, leaf)
    w, factor = coefficients_of(path.route).w, (setting.calls - 1) / wanted.live_calls
    for i in chosen:
        # an output made here is handed out until the next call that makes one
        until = next((j for j in range(i + 1, setting.calls) if plan.sources[j] == j), setting.calls)
        e = _gated(setting, path, kept[i], gates, i)
        (factor * sum(w[i:until]) * (g * e).sum()).backward()
    return distance.item()


def one_step_update(setting: Setting, wanted: SearchSettings, number: int, gates: Tensor, sample: int = 0) -> float:
    """On the pruned path, single outputs against the whole network's (as in Learning-to-Cache, Ma et al. 2024, arXiv
    2406.01733), each weighed as it reaches the image: ``Σ_i w_i² |e_i - ê_i|²``, of ``live_calls`` calls."""
    path, modules = setting.update_path(number, wanted.batch, sample), setting.family.skippable(setting.grain)
    plan, chosen = setting.plan(gates.detach().cpu() > 0.5), _live_calls(setting, wanted, number, sample)
    _, kept = pruned_walk(path, plan, set(chosen), modules)
    w, factor, total = coefficients_of(path.route).w, (setting.calls - 1) / wanted.live_calls, 0.0
    for i in chosen:
        with torch.no_grad():
            full = path.denoise(kept[i].x, kept[i].t, path.rows)
        error = factor * w[i] ** 2 * (_gated(setting, path, kept[i], gates, i) - full).square().mean()
        error.backward()
        total += error.item()
    return total


def _gated(setting: Setting, path: Path, kept: KeptCall, gates: Tensor, i: int) -> Tensor:
    here = dict(zip(setting.wiring.units, gates[i], strict=True))
    with torch.enable_grad():
        return gated_call(
            setting.family.skippable(setting.grain),
            lambda: path.denoise(kept.x, kept.t, path.rows),
            here,
            {unit: on_tensors(lambda part: part.detach(), value) for unit, value in kept.stored.items()},
        )[0]


def l2c_update(setting: Setting, wanted: SearchSettings, number: int, gates: Tensor, sample: int = 0) -> float:
    """See :func:`sdo_cli.prune.caching.cached_update`."""
    return cached_update(setting, wanted.live_calls, number, gates, sample, wanted.batch)
