"""Which draw of live calls is nearest to full backpropagation, at the same cost? (docs/gradients.md, "Better draws")

python scripts/studies/better_draws.py [--batches 3] [--draws 60] [recipe overrides …]

The gradient of every sample at every call is taken apart once, so that any draw is a sum of rows.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.drawing.draw import make_route
from sdo_cli.gradients.full import full
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.three_stage import shortcut
from sdo_cli.recipe.load import load_recipe
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job, path_of
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import prepare
from sdo_cli.training.replays import Replays
from sdo_cli.training.rollouts import cosine, flat_gradient

PLAIN = ["rollout={}", "gradient.options={}", "validation.prompts={}", "validation.rewards=[]"]
# makes one draw of gradients [samples, calls, parameters]
Draw = Callable[[Tensor], Tensor]


def taken(job: Job) -> Tensor:
    flat = flat_gradient(job.parameters).float()
    for parameter in job.parameters:
        parameter.grad = None
    return flat


def apart(job: Job, order: PromptOrder, step: int) -> tuple[Tensor, Tensor]:
    """Every sample's gradient at every call, and full backpropagation's of the batch."""
    calls, batch = coefficients_of(make_route(job.family, job.draw_settings)).calls, job.global_batch
    mode = torch.full((calls, batch), int(Mode.WEIGHTS))
    turn = torch.arange(calls)[:, None].repeat(1, batch)
    replays = Replays(step)
    accumulate(job, order, step, plan=Plan(mode, torch.ones(calls, batch), turn=turn), replays=replays)
    found = torch.zeros(batch, calls, len(taken(job)))
    kept = replays.slices[0]
    path = path_of(job, step, range(batch), [order.at(step * batch + row) for row in range(batch)])
    for live in kept.live:
        shortcut(path, [[replace(live, turn=0)]], kept.g, Terms(batch))
        found[live.row, live.call] = taken(job)
    accumulate(job, order, step, plan=full(calls, batch, None, None))
    return found, taken(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    job, _ = prepare(load_recipe("quickstart", [*PLAIN, *given.overrides]))
    chance = keyed_generator(0, "bench-adapter")
    with torch.no_grad():
        for parameter in job.parameters:
            if not bool(parameter.any()):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=chance))
    order, generator = PromptOrder(job.prompts, job.recipe.seed), torch.Generator().manual_seed(0)
    batches = [apart(job, order, step) for step in range(given.batches)]
    w = torch.tensor(coefficients_of(make_route(job.family, job.draw_settings)).w).abs().float().clamp(min=1e-2)
    calls, size = len(w), job.global_batch
    norms = torch.stack([found.norm(dim=2).mean(0) for found, _ in batches]).mean(0)
    even, by_weight, by_norm = torch.full((calls,), 1 / calls), w / w.sum(), norms / norms.sum()

    def offsets() -> Tensor:
        return (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size

    def one(p: Tensor, scale: Tensor | None = None, alike: bool = False) -> Draw:
        def draw(found: Tensor) -> Tensor:
            at = offsets()[:1].repeat(size) if alike else offsets()
            rows = torch.searchsorted(p.cumsum(0) / p.sum(), at).clamp(max=calls - 1)
            factor = (1 if scale is None else scale[rows]) / p[rows]
            return (factor[:, None] * found[torch.arange(size), rows]).sum(0)

        return draw

    def dealt(k: int, scale: Tensor | None = None) -> Draw:
        """k calls of each sample, one out of every k-th of the way: K = k, or k updates of one rollout."""

        def draw(found: Tensor) -> Tensor:
            rows = ((torch.arange(k)[:, None] + offsets()[None]) / k * calls).long().clamp(max=calls - 1)
            factor = torch.ones(k, size) if scale is None else scale[rows]
            return (factor[..., None] * found[torch.arange(size)[None], rows]).sum((0, 1))

        return draw

    def several(draw: Draw, count: int) -> Draw:
        return lambda found: torch.stack([draw(found) for _ in range(count)]).sum(0)

    root, unit = w**-0.5, 1 / w
    arms: dict[str, tuple[Draw, Tensor]] = {
        "true/p": (one(even), w / w),
        "true/p, weight-proportional": (one(by_weight), w / w),
        "true/p, p by norms": (one(by_norm), w / w),
        "true/p, one call for the batch by weight": (one(by_weight, alike=True), w / w),
        "true/p, K = 2": (dealt(2), w / w),
        "true/p, four independent draws": (several(one(even), 4), w / w),
        "true/p, four dealt out": (dealt(4), w / w),
        "root": (one(even, root), root),
        "root, p by norms": (one(norms * root / (norms * root).sum(), root), root),
        "root, K = 2": (dealt(2, root), root),
        "root, four independent draws": (several(one(even, root), 4), root),
        "root, four dealt out": (dealt(4, root), root),
        "three quarters of the way to unit": (one(even, w**-0.75), w**-0.75),
        "unit": (one(even, unit), unit),
    }
    for name, (draw, scale) in arms.items():
        near = [cosine(draw(found), whole) for found, whole in batches for _ in range(given.draws)]
        mean = [cosine((found * scale[None, :, None]).sum((0, 1)), whole) for found, whole in batches]
        print(f"{name:42} one draw {sum(near) / len(near):.3f}   in the mean {sum(mean) / len(mean):.3f}")


if __name__ == "__main__":
    main()
