"""The bare parts an iteration is made of, without sdo's engines: what its cost is counted from and held against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdo_cli.bench.bench_job import Workbench
from sdo_cli.drawing.draw import draw_noise, encode_pair, make_path
from sdo_cli.estimate.units import call_shares
from sdo_cli.gradients.counts import LIVE
from sdo_cli.gradients.counts import counts as part_counts
from sdo_cli.gradients.plan import Plan
from sdo_cli.sampling.loop import Path
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.job import Job
from sdo_cli.training.objective import RewardObjective


@dataclass(frozen=True)
class Parts:
    """Callables, each doing one part once for the whole batch.

    ``call`` is one guided network call without a graph; the ``live`` ones are a guided call and its backward, with
    the input held or followed; ``score`` is decoder and reward, forward and backward.
    """

    run: dict[str, Callable[[], None]]


def make_parts(bench: Workbench) -> Parts:
    """Parts at the recipe's batch, on one fixed input."""
    job = bench.any_job
    recipe, settings = job.recipe, job.draw_settings
    rows = range(recipe.train_batch_size)
    noise = draw_noise(job.family, settings, [keyed_generator(recipe.seed, "bench-parts", 0, row) for row in rows])
    prompts = [bench.order.at(row) for row in rows]
    condition, negative = encode_pair(job.embed, settings, prompts)
    path = make_path(job.family, settings, noise, condition, negative, recipe.gradient.negative_gradient)
    level, t = path.route.levels[0], path.route.begin()[1][0].to(path.x_0.device).expand(len(rows))
    x = level.scale * path.x_0

    def score(of: Job) -> None:
        leaf = noise.initial.detach().requires_grad_()
        objective = RewardObjective(
            of.family,
            of.rewards,
            prompts,
            of.decode,
            of.recipe.combine,
            of.recipe.sight,
            draw=lambda row, view: keyed_generator(recipe.seed, f"bench-view {view}", 0, row),
        )
        torch.autograd.grad(objective(leaf, path.rows).losses.sum(), leaf)

    @torch.no_grad()
    def call() -> None:
        path.denoise(x, t, path.rows)

    run: dict[str, Callable[[], None]] = {"call": call}
    run |= {score_name(other.recipe.decoder): partial(score, other) for other in bench.jobs.values()}
    for (through, checkpointing), name in LIVE.items():
        run[name] = _live(bench, path, x, t, through, checkpointing)
    return Parts(run)


def _live(bench: Workbench, path: Path, x: Tensor, t: Tensor, through: bool, checkpointing: str) -> Callable[[], None]:
    denoiser = bench.any_job.family.denoiser

    def live() -> None:
        if checkpointing == "blocks":
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.disable_gradient_checkpointing()
        leaf = x.detach().requires_grad_(through)
        if checkpointing == "calls":
            e = checkpoint(path.denoise, leaf, t, path.rows, use_reentrant=False)
        else:
            e = path.denoise(leaf, t, path.rows)
        e.sum().backward()
        for parameter in bench.parameters:
            parameter.grad = None

    return live


def score_name(decoder: str) -> str:
    """The part that decodes and scores."""
    return "score" if decoder == "full" else f"score, {decoder}"


def counts(job: Job, plan: Plan, checkpointing: str) -> dict[str, float]:
    """How often each part runs in one step of a job, in the mean of a plan's updates (see :mod:`.gradients.counts`).

    Calls that a skip plan leaves parts of out count as the share that is computed.
    """
    found = _counts(job, plan, checkpointing)
    return {score_name(job.recipe.decoder) if name == "score" else name: number for name, number in found.items()}


def _counts(job: Job, plan: Plan, checkpointing: str) -> dict[str, float]:
    skips, spec = job.drawn_now.skips, job.recipe.rollout
    of_step = partial(
        part_counts,
        slice_size=job.recipe.train_batch_size,
        regularised=bool(job.recipe.kl_weight),
        updates=1 if plan.turn is None else spec.updates,
        rescored=spec.rescore,
        sharp=job.recipe.gradient.weight_sharpness > 0,
        drawn_by_other=job.drawn_now.network is not None or (skips is not None and not skips.exact),
    )
    if job.drawn_now.network is not None:
        return of_step(plan, checkpointing, rollout_share=job.drawn_now.share)
    if skips is None:
        return of_step(plan, checkpointing)
    shares = call_shares(job.recipe, skips.plan)
    # run again as they were, or whole
    live = float(shares[plan.live.nonzero()[:, 0]].mean()) if skips.exact else 1.0
    rollout = float(shares[: plan.calls_run].mean())
    return of_step(plan, checkpointing, rollout_share=rollout, live_share=live)


def total(count: dict[str, float], of_part: dict[str, float]) -> float:
    """Σ count · cost."""
    return sum(number * of_part[name] for name, number in count.items() if number)


def without_recomputation(count: dict[str, float]) -> dict[str, float]:
    """The bare parts: the same calls, the forward of a live one not run again in its backward pass."""
    floor: dict[str, float] = {}
    plain = {name: LIVE[through, "none"] for (through, _), name in LIVE.items()}
    for name, number in count.items():
        bare = plain.get(name, name)
        floor[bare] = floor.get(bare, 0.0) + number
    return floor
