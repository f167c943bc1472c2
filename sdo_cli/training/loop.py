"""The training loop: a generator of step results that does no I/O."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from sdo_cli.gradients.outcome import Outcome, added
from sdo_cli.optimizers.mofasgd import MoFaSGD, matrices_of
from sdo_cli.optimizers.stepper import Step, Stepper
from sdo_cli.optimizers.zero import ZeroAdamW
from sdo_cli.parallel.shards import forget_gathered
from sdo_cli.recipe.schema import Recipe
from sdo_cli.records.step import Drift, Replay, StepResult
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job, plan_step, slices_of
from sdo_cli.training.lora import in_call_order
from sdo_cli.training.objective import RewardObjective
from sdo_cli.training.passes import accumulate
from sdo_cli.training.replays import Replays
from sdo_cli.training.rollouts import cosine, distance_of, flat_gradient
from sdo_cli.training.sharp import sharpen


@dataclass(frozen=True)
class Slice:
    """What one pass over ``train_batch_size`` samples leaves for the metrics; the same wherever it ran."""

    number: int
    losses: Tensor
    rewards: dict[str, Tensor]
    penalties: Tensor | None
    calls: dict[str, int]
    changes: Tensor | None = None
    looks: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None


def make_stepper(job: Job) -> Stepper:
    """A fresh one for this job, whose optimizer and model may be in parts."""
    model, world = job.family.denoiser, job.world
    if job.recipe.optimizer == "mofasgd":
        matrices, others = matrices_of(model, job.parameters)
        return Stepper(
            job.recipe, job.parameters, deal=partial(MoFaSGD, job.recipe, world, matrices=matrices), adamw_only=others
        )
    deal = None if world.zero is None else partial(ZeroAdamW, job.recipe, world, model=model)
    return Stepper(job.recipe, job.parameters, partial(forget_gathered, model) if world.sharded else None, deal=deal)


def train(
    job: Job,
    *,
    stepper: Stepper | None = None,
    start: int = 0,
    replays: Replays | None = None,
    change_g: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[StepResult]:
    """Run the recipe's steps, one result after each; after the last one the weights are those to keep.

    Args:
        stepper: a fresh one by default; restored from a checkpoint to go on.
        start: steps that were taken before.
        replays: which rollout the first of these steps goes on with; restored from a checkpoint to go on inside one.
        change_g: for control experiments: replaces the gradient at the image side, given (g, rollout).
    """
    recipe, stepper = job.recipe, stepper or make_stepper(job)
    order, every = PromptOrder(job.prompts, recipe.seed), recipe.rollout.drift_steps
    replays = replays or Replays.after(start, every)
    looked = None
    if job.spreads is not None and not job.spreads.begun:
        looked = replays.rollout
        first_spreads(job, order, looked)
    for step in range(start, recipe.max_train_steps):
        drift = None
        if replays.update == 0:
            replays.begin(step, every)
            drift = look_at_drift(job, order, replays.rollout, stepper.scale) if replays.due else None
        outcomes = take_gradients(job, order, replays, stepper, change_g)
        slices, seconds = gather_slices(job, outcomes)
        gap = look_at_decoder(job, order, replays, outcomes)
        found = look_at_replay(job, order, replays, slices, stepper.scale)
        result = _summarise(recipe, step + 1, slices, seconds, stepper.step(step + 1, bad_reward(slices)))
        # a rollout is counted once
        fresh = replays.update == 0 and replays.rollout != looked
        divided = spreads_after(job, slices, fresh=fresh)
        replays.end_update(over=is_last(recipe, replays.update, found) or result.skipped)
        cheap = job.rollouts is not None and job.rollouts.on
        yield replace(result, drift=drift, cheap_rollouts=cheap, replay=found, decoder_gap=gap, spreads=divided)
    stepper.finish()


def take_gradients(
    job: Job,
    order: PromptOrder,
    replays: Replays,
    stepper: Stepper,
    change_g: Callable[[Tensor, int], Tensor] | None = None,
) -> list[Outcome]:
    """The step's gradient, summed over all processes, in the parameters."""
    is_sharp = job.recipe.gradient.weight_sharpness > 0
    adding = None if is_sharp else stepper.adding(job.world, in_call_order(job.family, job.parameters))
    outcomes = accumulate(
        job,
        order,
        replays.rollout,
        replays=replays,
        scale=stepper.scale,
        backward=stepper.backward,
        last_backward=adding.backward if adding else None,
        change_g=change_g,
        keep=is_sharp,
    )
    if adding is None:
        return sharpen(job, order, replays.rollout, outcomes, update=replays.update, scale=stepper.scale)
    # before anything else that all processes do together: buckets may be on their way
    adding.finish()
    return outcomes


def first_spreads(job: Job, order: PromptOrder, rollout: int) -> None:
    """Before the first step: the spread of its own rewards, for which it is drawn once more; or of further ones."""
    assert job.spreads is not None
    while not job.spreads.begun:
        slices, _ = gather_slices(job, accumulate(job, order, rollout))
        _forget_gradients(job.parameters)
        spreads_after(job, slices, fresh=True)
        if bad_reward(slices) is not None:
            # the step says so
            break
        # prompts of this run only are encoded
        rollout = (rollout + 1) % job.recipe.max_train_steps


def spreads_after(job: Job, slices: list[Slice], *, fresh: bool) -> dict[str, float] | None:
    """What rewards were divided by in this step; then its scores are counted, if they are a new rollout's."""
    if job.spreads is None:
        return None
    divided = {item.name: job.spreads.of(item.name) for item in job.rewards}
    if fresh and bad_reward(slices) is None:
        job.spreads.add({name: torch.cat([part.rewards[name] for part in slices]) for name in divided})
    return divided


def is_last(recipe: Recipe, update: int, found: Replay | None) -> bool:
    """Whether a rollout has no update after this one: they have all been made, or the network has changed too much."""
    limit = recipe.rollout.max_change
    return update + 1 >= recipe.rollout.updates or (found is not None and bool(limit) and found.change > limit)


def look_at_replay(job: Job, order: PromptOrder, replays: Replays, slices: list[Slice], scale: float) -> Replay | None:
    """How old the rollout is by this update; None where each has one.

    When it is time, the cosine of the gradient that stands in the parameters to that of a fresh rollout with the same
    noise, prompts and live calls is taken at the last update.
    """
    if job.recipe.rollout.updates == 1:
        return None
    changes = [part.changes for part in slices if part.changes is not None and len(part.changes)]
    found = Replay(replays.update + 1, torch.cat(changes).mean().item() if changes else 0.0)
    if not (replays.due and replays.update and is_last(job.recipe, replays.update, found)):
        return found
    kept, mine = [parameter.grad for parameter in job.parameters], flat_gradient(job.parameters)
    _forget_gradients(job.parameters)
    is_sharp = job.recipe.gradient.weight_sharpness > 0
    plan = plan_step(job, replays.rollout).of_updates(replays.update)
    outcomes = accumulate(job, order, replays.rollout, plan=plan, scale=scale, keep=is_sharp)
    if is_sharp:
        sharpen(job, order, replays.rollout, outcomes, scale=scale)
    else:
        job.world.add_gradients(job.parameters)
    fresh = flat_gradient(job.parameters)
    for parameter, gradient in zip(job.parameters, kept, strict=True):
        parameter.grad = gradient
    return replace(found, cosine=cosine(mine, fresh))


@torch.no_grad()
def look_at_decoder(job: Job, order: PromptOrder, replays: Replays, outcomes: list[Outcome]) -> dict[str, float] | None:
    """When it is time: by how much this rollout's rewards are higher through the model's own decoder, by name."""
    if job.recipe.decoder != "tiny" or not replays.due or replays.update:
        return None
    size, gaps = job.recipe.train_batch_size, list[dict[str, float]]()
    for part, outcome in zip(slices_of(job), outcomes, strict=True):
        for row in range(size):
            prompt = order.at(replays.rollout * job.global_batch + part * size + row)
            own = RewardObjective(job.family, job.rewards, [prompt])(outcome.x_N[row : row + 1], torch.zeros(1).long())
            gaps.append({name: float(score - outcome.rewards[name][row]) for name, score in own.rewards.items()})
    every = [gap for part in job.world.gather(gaps) for gap in part]
    return {name: sum(gap[name] for gap in every) / len(every) for name in every[0]}


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def look_at_drift(job: Job, order: PromptOrder, step: int, scale: float) -> Drift | None:
    """How far this step's cheap rollouts and their gradient are from full ones; None where they are full.

    Beyond the recipe's limit cheap rollouts are over, and this step is drawn in full already.
    """
    spec, rollouts = job.recipe.rollout, job.rollouts
    if rollouts is None or not rollouts.on:
        return None

    def tried(job: Job) -> tuple[list[Outcome], Tensor]:
        outcomes = accumulate(job, order, step, scale=scale)
        job.world.add_gradients(job.parameters)
        gradient = flat_gradient(job.parameters)
        _forget_gradients(job.parameters)
        return outcomes, gradient

    (short, mine), (full, theirs) = tried(job), tried(replace(job, rollouts=None))
    gaps = job.world.gather(distance_of(short, full))
    distance = (sum(gap for gap, _ in gaps) / sum(size for _, size in gaps)) ** 0.5
    rollouts.on = not spec.max_drift or distance <= spec.max_drift
    worse = mean_loss(job, short) - mean_loss(job, full)
    return Drift(distance, cosine(mine, theirs), worse)


def mean_loss(job: Job, outcomes: list[Outcome]) -> float:
    """Over all processes' samples."""
    slices, _ = gather_slices(job, outcomes)
    return torch.cat([part.losses for part in slices]).mean().item()


def gather_slices(job: Job, outcomes: list[Outcome]) -> tuple[list[Slice], dict[str, float]]:
    """Every process's slices in their order, and the seconds of the slowest by stage."""
    mine = [
        Slice(
            number,
            outcome.losses.cpu(),
            {name: scores.cpu() for name, scores in outcome.rewards.items()},
            None if outcome.penalties is None else outcome.penalties.cpu(),
            outcome.calls,
            outcome.changes,
            {name: torch.cat([piece[name] for piece in outcome.looks]) for name in (outcome.looks or [{}])[0]},
            None if outcome.uncertainty is None else outcome.uncertainty.cpu(),
        )
        for number, outcome in zip(slices_of(job), outcomes, strict=True)
    ]
    found = job.world.gather((mine, added([outcome.seconds for outcome in outcomes])))
    every = sorted((part for parts, _ in found for part in parts), key=lambda part: part.number)
    stages = dict.fromkeys(name for _, seconds in found for name in seconds)
    return every, {name: max(seconds.get(name, 0.0) for _, seconds in found) for name in stages}


def bad_reward(slices: list[Slice]) -> str | None:
    """The name of a reward that was not finite for some sample, None if all were."""
    scored = ((name, scores) for part in slices for name, scores in part.rewards.items())
    return next((name for name, scores in scored if not bool(torch.isfinite(scores).all())), None)


def _summarise(recipe: Recipe, step: int, slices: list[Slice], seconds: dict[str, float], taken: Step) -> StepResult:
    losses = torch.cat([part.losses for part in slices])
    rewards = {name: torch.cat([part.rewards[name] for part in slices]).mean().item() for name in slices[0].rewards}
    calls = {name: sum(part.calls[name] for part in slices) for name in slices[0].calls}
    penalties = [part.penalties for part in slices if part.penalties is not None]
    penalty = torch.cat(penalties).mean().item() if penalties else None
    looks = {name: torch.cat([part.looks[name] for part in slices]).mean().item() for name in slices[0].looks}
    found = StepResult(
        step, losses.mean().item(), rewards, taken.norm, taken.rate, seconds, calls, penalty, taken.skipped
    )
    return replace(found, gradients=looks or None, gate=_gate(recipe, slices))


def _gate(recipe: Recipe, slices: list[Slice]) -> dict[str, float] | None:
    """How uncertain the rewards were and whom that let be held; None where nobody is held, or nothing tells."""
    doubts = [part.uncertainty for part in slices if part.uncertainty is not None]
    if not doubts or not recipe.kl_weight:
        return None
    every = torch.cat(doubts)
    held = (every > recipe.kl_gate).float().mean().item() if recipe.kl_gate else 1.0
    return {"uncertainty": every.mean().item(), "highest": every.max().item(), "share": held}
