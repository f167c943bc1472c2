"""The training loop: a generator of step results that does no I/O."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sdo_cli.drawing.draw import DrawSettings, draw_noise, draw_settings, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import PluginFault
from sdo_cli.finetune.batches import PromptOrder
from sdo_cli.finetune.lora import in_call_order
from sdo_cli.finetune.objective import RewardObjective, WeightedReward
from sdo_cli.finetune.rollouts import Rollouts, cosine, distance_of, flat_gradient
from sdo_cli.gradients.outcome import Outcome, Terms, added
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import RULES, find_rule
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.skipped import plan_among_computed
from sdo_cli.gradients.three_stage import MicroBatches
from sdo_cli.models.base import Family
from sdo_cli.optimizers.stepper import Step, Stepper
from sdo_cli.optimizers.zero import ZeroAdamW
from sdo_cli.parallel.shards import forget_gathered
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.recipe.schema import Recipe
from sdo_cli.records.step import Drift, StepResult
from sdo_cli.sampling.coefficients import Coefficients, coefficients_of
from sdo_cli.sampling.guidance import Guided
from sdo_cli.sampling.loop import Path
from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class Slice:
    """What one pass over ``train_batch_size`` samples leaves for the metrics; the same wherever it ran."""

    number: int
    losses: Tensor
    rewards: dict[str, Tensor]
    penalties: Tensor | None
    calls: dict[str, int]


@dataclass(frozen=True)
class Job:
    """Everything the loop works on, ready made."""

    recipe: Recipe
    family: Family
    rewards: list[WeightedReward]
    prompts: list[str]
    parameters: list[nn.Parameter]
    embed: PromptEmbeddings
    world: World = SINGLE
    rollouts: Rollouts | None = None

    @property
    def global_batch(self) -> int:
        return self.recipe.global_batch(self.world.size)

    @property
    def draw_settings(self) -> DrawSettings:
        return draw_settings(self.recipe)

    @property
    def drawn_now(self) -> Rollouts:
        """How this step's samples are drawn."""
        return self.rollouts if self.rollouts is not None and self.rollouts.on else Rollouts(self.draw_settings)


def make_stepper(job: Job) -> Stepper:
    """A fresh one for this job, whose optimizer and model may be in parts."""
    model, world = job.family.denoiser, job.world
    deal = None if world.zero is None else partial(ZeroAdamW, job.recipe, world, model=model)
    return Stepper(job.recipe, job.parameters, partial(forget_gathered, model) if world.sharded else None, deal=deal)


def train(
    job: Job,
    *,
    stepper: Stepper | None = None,
    start: int = 0,
    change_g: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[StepResult]:
    """Run the recipe's steps, one result after each; after the last one the weights are those to keep.

    Args:
        stepper: a fresh one by default; restored from a checkpoint to go on.
        start: steps that were taken before.
        change_g: for control experiments: replaces the gradient at the image side, given (g, step).
    """
    recipe, stepper = job.recipe, stepper or make_stepper(job)
    order = PromptOrder(job.prompts, recipe.seed)
    for step in range(start, recipe.max_train_steps):
        drift = look_at_drift(job, order, step, stepper.scale)
        adding = job.world.adding(in_call_order(job.family, job.parameters))
        outcomes = accumulate(
            job,
            order,
            step,
            scale=stepper.scale,
            backward=stepper.backward,
            last_backward=adding.backward,
            change_g=change_g,
        )
        # before anything else that all processes do together: buckets may be on their way
        adding.finish()
        slices, seconds = gather_slices(job, outcomes)
        result = _summarise(step + 1, slices, seconds, stepper.step(step + 1, bad_reward(slices)))
        yield replace(result, drift=drift, cheap_rollouts=job.rollouts is not None and job.rollouts.on)
    stepper.finish()


def look_at_drift(job: Job, order: PromptOrder, step: int, scale: float) -> Drift | None:
    """When it is time: how far this step's cheap rollouts and their gradient are from full ones.

    Beyond the recipe's limit cheap rollouts are over, and this step is drawn in full already.
    """
    spec, rollouts = job.recipe.rollout, job.rollouts
    if rollouts is None or not rollouts.on or not spec.drift_steps or step % spec.drift_steps:
        return None

    def tried(job: Job) -> tuple[list[Outcome], Tensor]:
        outcomes = accumulate(job, order, step, scale=scale)
        job.world.add_gradients(job.parameters)
        gradient = flat_gradient(job.parameters)
        for parameter in job.parameters:
            parameter.grad = None
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


def plan_step(job: Job, step: int) -> Plan:
    """The plan of the whole global batch at one step."""
    return make_plan(job, keyed_generator(job.recipe.seed, "plan", step))


def make_plan(job: Job, generator: torch.Generator) -> Plan:
    """What the recipe's rule draws for the global batch; the fault of a plug-in's rule is said to be the plug-in's.

    Raises:
        PluginFault: the rule of a plug-in failed or did not keep its contract.
    """
    spec, rollouts = job.recipe.gradient, job.drawn_now
    c = coefficients_of(make_route(job.family, rollouts.settings))
    rule, info = find_rule(spec.rule), RULES[spec.rule]

    def drawn(calls: int, c: Coefficients) -> Plan:
        return rule(calls, job.global_batch, c, generator, **spec.options)

    def over_calls() -> Plan:
        if rollouts.skips is not None and rollouts.skips.exact:
            return plan_among_computed(drawn, c, rollouts.skips.plan.sources)
        return drawn(c.calls, c)

    if info.function is None:
        return over_calls()
    try:
        plan = over_calls()
    # it may raise anything
    except Exception as fault:
        text = f"the plug-in's rule {spec.rule} failed: {type(fault).__name__}: {fault}"
        raise PluginFault(text, remedy="run it with --debug to see where") from fault
    if not isinstance(plan, Plan) or plan.mode.shape != (c.calls, job.global_batch):
        got = f"a plan of {tuple(plan.mode.shape)}" if isinstance(plan, Plan) else f"a {type(plan).__name__}"
        text = f"the plug-in's rule {spec.rule} returned {got}, not a Plan of ({c.calls}, {job.global_batch})"
        raise PluginFault(text, remedy="return Plan(mode, weight), both [calls, batch]; see docs/plugins.md")
    if not plan.is_one_step_deep() and not info.chained:
        text = f"the plug-in's rule {spec.rule} chains live calls and does not say so"
        raise PluginFault(text, remedy="write chained=True in its @gradient_rule(…); see docs/plugins.md")
    return plan


def accumulate(
    job: Job,
    order: PromptOrder,
    step: int,
    *,
    plan: Plan | None = None,
    scale: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    last_backward: Callable[[Tensor], None] | None = None,
    change_g: Callable[[Tensor, int], Tensor] | None = None,
) -> list[Outcome]:
    """Gradients of this process's part of the global batch of one step, slice by slice, added into the parameters.

    Args:
        plan: instead of the one the recipe's rule draws for this step; the noise and prompts stay the step's.
        scale: gradients come out multiplied with it (the loss scaler of fp16).
        backward, last_backward: see :class:`Terms`.
    """
    plan = plan or plan_step(job, step)
    terms, parts = Terms(job.global_batch, job.recipe.kl_weight, scale, backward), slices_of(job)
    last = replace(terms, last_backward=last_backward)
    return [
        _pass(job, order, step, part=part, plan=plan, terms=last if part == parts[-1] else terms, change_g=change_g)
        for part in parts
    ]


def slices_of(job: Job) -> range:
    """Numbers of the slices of the global batch that this process computes."""
    every = job.recipe.gradient_accumulation_steps * job.world.size
    return range(job.world.rank, every, job.world.size)


def _pass(
    job: Job,
    order: PromptOrder,
    step: int,
    *,
    part: int,
    plan: Plan,
    terms: Terms,
    change_g: Callable[[Tensor, int], Tensor] | None,
) -> Outcome:
    """Gradients of one slice of the global batch, accumulated into the parameters."""
    recipe, size = job.recipe, job.recipe.train_batch_size
    mine = range(part * size, (part + 1) * size)
    prompts = [order.at(step * job.global_batch + sample) for sample in mine]
    path = path_of(job, step, mine, prompts)
    objective = RewardObjective(job.family, job.rewards, prompts)
    spec = recipe.gradient
    micro = MicroBatches(
        spec.rollout_micro_batch or None, spec.score_micro_batch or None, spec.shortcut_micro_batch or None
    )
    change = None if change_g is None else lambda g: change_g(g, step)
    return run_plan(
        path,
        plan.rows(slice(mine.start, mine.stop), in_step=job.world.in_step),
        objective,
        terms=terms,
        micro=micro,
        checkpointing=spec.checkpointing == "calls",
        change_g=change,
    )


def path_of(job: Job, step: int, mine: range, prompts: list[str]) -> Path:
    """How these samples of a step are drawn, and what their gradients are taken of."""
    recipe, drawn = job.recipe, job.drawn_now
    noise = draw_noise(job.family, drawn.settings, [keyed_generator(recipe.seed, "noise", step, s) for s in mine])
    # what is trained keeps its guidance, whoever draws
    live = replace(drawn.settings, guidance_scale=recipe.guidance_scale)
    condition, negative = encode_pair(job.embed, live, prompts)
    path = make_path(job.family, live, noise, condition, negative, recipe.gradient.negative_gradient, drawn.skips)
    if drawn.network is None:
        return path
    condition, negative = encode_pair(job.embed, drawn.settings, prompts)
    return replace(path, fast=Guided(drawn.network, condition, negative, drawn.settings.guidance))


def gather_slices(job: Job, outcomes: list[Outcome]) -> tuple[list[Slice], dict[str, float]]:
    """Every process's slices in their order, and the seconds of the slowest by stage."""
    mine = [
        Slice(
            number,
            outcome.losses.cpu(),
            {name: scores.cpu() for name, scores in outcome.rewards.items()},
            None if outcome.penalties is None else outcome.penalties.cpu(),
            outcome.calls,
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


def _summarise(step: int, slices: list[Slice], seconds: dict[str, float], taken: Step) -> StepResult:
    losses = torch.cat([part.losses for part in slices])
    rewards = {name: torch.cat([part.rewards[name] for part in slices]).mean().item() for name in slices[0].rewards}
    calls = {name: sum(part.calls[name] for part in slices) for name in slices[0].calls}
    penalties = [part.penalties for part in slices if part.penalties is not None]
    penalty = torch.cat(penalties).mean().item() if penalties else None
    return StepResult(
        step, losses.mean().item(), rewards, taken.norm, taken.rate, seconds, calls, penalty, taken.skipped
    )
