"""Gradients of one step: slice by slice of the global batch, on a rollout of its own or on one that is kept."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from sdo_cli.gradients.outcome import Outcome, Terms
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.replay import replay
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.three_stage import MicroBatches
from sdo_cli.sampling.loop import Path
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job, path_of, plan_step, slice_plan, slices_of
from sdo_cli.training.objective import RewardObjective
from sdo_cli.training.replays import Replays


def accumulate(
    job: Job,
    order: PromptOrder,
    step: int,
    *,
    plan: Plan | None = None,
    replays: Replays | None = None,
    scale: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    last_backward: Callable[[Tensor], None] | None = None,
    change_g: Callable[[Tensor, int], Tensor] | None = None,
    keep: bool = False,
) -> list[Outcome]:
    """Gradients of this process's part of the global batch of one step, slice by slice, added into the parameters.

    Args:
        step: of several updates per rollout: the rollout's number.
        plan: instead of the one the recipe's rule draws for this step; the noise and prompts stay the step's.
        replays: where training is: what is kept for later updates is left there, and taken from there. Without it the
            first update's gradients are made.
        scale: gradients come out multiplied with it (the loss scaler of fp16).
        backward, last_backward: see :class:`Terms`.
        keep: leave in the outcomes what it takes to make their live calls again.
    """
    if plan is None and not (replays and replays.update):
        plan = plan_step(job, step) if replays else plan_step(job, step).of_updates(0)
    terms = terms_of(job, scale, backward)
    last, parts = replace(terms, last_backward=last_backward), slices_of(job)
    run = partial(_pass, job, order, step, plan=plan, replays=replays, change_g=change_g, keep=keep)
    return [run(part=part, terms=last if part == parts[-1] else terms) for part in parts]


def terms_of(job: Job, scale: float = 1.0, backward: Callable[[Tensor], None] = Tensor.backward) -> Terms:
    """How a step's loss is put together, as the recipe has it."""
    recipe = job.recipe
    return Terms(job.global_batch, recipe.kl_weight, recipe.rollout.proximal, scale, backward, kl_gate=recipe.kl_gate)


def samples_of(job: Job, order: PromptOrder, step: int, part: int) -> tuple[range, list[str]]:
    """Numbers in the global batch, and prompts, of one slice."""
    size = job.recipe.train_batch_size
    mine = range(part * size, (part + 1) * size)
    return mine, [order.at(step * job.global_batch + sample) for sample in mine]


def path_and_micro(job: Job, order: PromptOrder, step: int, part: int) -> tuple[Path, MicroBatches]:
    """How one slice is drawn, and in what pieces each stage goes through it."""
    spec = job.recipe.gradient
    micro = MicroBatches(
        spec.rollout_micro_batch or None, spec.score_micro_batch or None, spec.shortcut_micro_batch or None
    )
    return path_of(job, step, *samples_of(job, order, step, part)), micro


def _pass(
    job: Job,
    order: PromptOrder,
    step: int,
    *,
    part: int,
    plan: Plan | None,
    replays: Replays | None,
    terms: Terms,
    change_g: Callable[[Tensor, int], Tensor] | None,
    keep: bool,
) -> Outcome:
    """Gradients of one slice of the global batch, accumulated into the parameters.

    Args:
        plan: of a rollout; None to go on with the one that is kept.
    """
    recipe = job.recipe
    mine, prompts = samples_of(job, order, step, part)
    path, micro = path_and_micro(job, order, step, part)
    objective = RewardObjective(
        job.family,
        job.rewards,
        prompts,
        job.decode,
        recipe.combine,
        recipe.sight,
        draw=lambda row, view: keyed_generator(recipe.seed, f"view {view}", step, mine[row]),
        spread=job.spread_of,
    )
    if plan is None:
        assert replays is not None
        rescore = recipe.rollout.rescore
        found = replay(path, replays.slices[part], replays.update, objective, terms=terms, micro=micro, rescore=rescore)
        return replace(found, looks=objective.looks)
    change = None if change_g is None else lambda g: change_g(g, step)
    outcome = run_plan(
        path,
        slice_plan(job, plan, part),
        objective,
        terms=terms,
        micro=micro,
        checkpointing=recipe.gradient.checkpointing == "calls",
        change_g=change,
        keep=keep,
    )
    if replays is not None and outcome.kept is not None:
        replays.slices[part] = outcome.kept
    return replace(outcome, looks=objective.looks)


def where_it_is(job: Job, replays: Replays) -> dict[str, Any]:
    """For a checkpoint: the rollout, and the spread of the rewards so far; all processes call it."""
    spreads = {} if job.spreads is None else {"spreads": job.spreads.state()}
    return replays.state(job.world) | spreads


def go_on(job: Job, replays: Replays, state: dict[str, Any]) -> None:
    """Inside the rollout that a checkpoint was made in.

    Args:
        state: what :func:`where_it_is` gave then; ``job.rollouts`` are on or off as they were.
    """
    replays.load_state(state)
    if job.spreads is not None and "spreads" in state:
        job.spreads.load_state(state["spreads"])
    if replays.update:
        plan = plan_step(job, replays.rollout)
        plans = {part: slice_plan(job, plan, part) for part in slices_of(job)}
        replays.take_slices(state, plans, job.family.device)
