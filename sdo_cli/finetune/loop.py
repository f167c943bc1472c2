"""The training loop: a generator of step results that does no I/O."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdo_cli.drawing.draw import DrawSettings, draw_noise, draw_settings, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import PluginFault
from sdo_cli.finetune.batches import PromptOrder
from sdo_cli.finetune.objective import RewardObjective, WeightedReward
from sdo_cli.finetune.optimizer import Step, Stepper
from sdo_cli.gradients.outcome import Outcome, Terms, added
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import RULES, find_rule
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.three_stage import MicroBatches
from sdo_cli.models.base import Family
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``rewards`` are means over the global batch; ``calls`` count network calls per sample.

    ``penalty`` is the mean of (ε_θ - ε_base)² over the live calls when the recipe has a ``kl_weight``; ``skipped`` says
    that a reward or the gradient was not finite and nothing was changed.
    """

    step: int
    loss: float
    rewards: dict[str, float]
    grad_norm: float
    learning_rate: float
    seconds: dict[str, float]
    calls: dict[str, int]
    penalty: float | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Job:
    """Everything the loop works on, ready made."""

    recipe: Recipe
    family: Family
    rewards: list[WeightedReward]
    prompts: list[str]
    parameters: list[nn.Parameter]
    embed: PromptEmbeddings

    @property
    def global_batch(self) -> int:
        return self.recipe.train_batch_size * self.recipe.gradient_accumulation_steps

    @property
    def draw_settings(self) -> DrawSettings:
        return draw_settings(self.recipe)


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
    recipe, stepper = job.recipe, stepper or Stepper(job.recipe, job.parameters)
    order = PromptOrder(job.prompts, recipe.seed)
    for step in range(start, recipe.max_train_steps):
        outcomes = accumulate(job, order, step, scale=stepper.scale, change_g=change_g)
        yield _summarise(step + 1, outcomes, stepper.step(step + 1, bad_reward(outcomes)))
    stepper.finish()


def plan_step(job: Job, step: int) -> Plan:
    """The plan of the whole global batch at one step."""
    return make_plan(job, keyed_generator(job.recipe.seed, "plan", step))


def make_plan(job: Job, generator: torch.Generator) -> Plan:
    """What the recipe's rule draws for the global batch; the fault of a plug-in's rule is said to be the plug-in's.

    Raises:
        PluginFault: the rule of a plug-in failed or did not keep its contract.
    """
    spec = job.recipe.gradient
    c = coefficients_of(make_route(job.family, job.draw_settings))
    rule, info = find_rule(spec.rule), RULES[spec.rule]
    if info.function is None:
        return rule(c.calls, job.global_batch, c, generator, **spec.options)
    try:
        plan = rule(c.calls, job.global_batch, c, generator, **spec.options)
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
    change_g: Callable[[Tensor, int], Tensor] | None = None,
) -> list[Outcome]:
    """Gradients of the global batch of one step, slice by slice, added into the parameters.

    Args:
        plan: instead of the one the recipe's rule draws for this step; the noise and prompts stay the step's.
        scale: gradients come out multiplied with it (the loss scaler of fp16).
    """
    plan = plan or plan_step(job, step)
    slices = range(job.recipe.gradient_accumulation_steps)
    terms = Terms(job.global_batch, job.recipe.kl_weight, scale)
    return [_pass(job, order, step, part=part, plan=plan, terms=terms, change_g=change_g) for part in slices]


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
    settings = job.draw_settings
    noise = draw_noise(job.family, settings, [keyed_generator(recipe.seed, "noise", step, s) for s in mine])
    condition, negative = encode_pair(job.embed, settings, prompts)
    path = make_path(job.family, settings, noise, condition, negative, recipe.gradient.negative_gradient)
    objective = RewardObjective(job.family, job.rewards, prompts)
    spec = recipe.gradient
    micro = MicroBatches(
        spec.rollout_micro_batch or None, spec.score_micro_batch or None, spec.shortcut_micro_batch or None
    )
    change = None if change_g is None else lambda g: change_g(g, step)
    return run_plan(
        path,
        plan.rows(slice(mine.start, mine.stop)),
        objective,
        terms=terms,
        micro=micro,
        checkpointing=spec.checkpointing == "calls",
        change_g=change,
    )


def bad_reward(outcomes: list[Outcome]) -> str | None:
    """The name of a reward that was not finite for some sample, None if all were."""
    scored = ((name, scores) for outcome in outcomes for name, scores in outcome.rewards.items())
    return next((name for name, scores in scored if not bool(torch.isfinite(scores).all())), None)


def _summarise(step: int, outcomes: list[Outcome], taken: Step) -> StepResult:
    losses = torch.cat([outcome.losses for outcome in outcomes])
    names = outcomes[0].rewards
    rewards = {name: torch.cat([o.rewards[name] for o in outcomes]).mean().item() for name in names}
    seconds = added([outcome.seconds for outcome in outcomes])
    calls = {name: sum(o.calls[name] for o in outcomes) for name in outcomes[0].calls}
    penalties = [outcome.penalties for outcome in outcomes if outcome.penalties is not None]
    penalty = torch.cat(penalties).mean().item() if penalties else None
    return StepResult(
        step, losses.mean().item(), rewards, taken.norm, taken.rate, seconds, calls, penalty, taken.skipped
    )
