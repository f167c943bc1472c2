"""What training works on, and what is drawn for each step: plans, noise, prompts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdo_cli.drawing.draw import DrawSettings, draw_noise, draw_settings, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import PluginFault
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import RULES, find_rule, with_updates
from sdo_cli.gradients.skipped import plan_among_computed
from sdo_cli.models.base import Family
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.coefficients import Coefficients, coefficients_of
from sdo_cli.sampling.guidance import Guided
from sdo_cli.sampling.loop import Path
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.objective import WeightedReward
from sdo_cli.training.rollouts import Rollouts
from sdo_cli.training.spreads import Spreads


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
    decode: Callable[[Tensor], Tensor] | None = None
    spreads: Spreads | None = None

    @property
    def global_batch(self) -> int:
        return self.recipe.global_batch(self.world.size)

    def spread_of(self, name: str) -> float:
        """What a reward's loss is divided by."""
        return 1.0 if self.spreads is None else self.spreads.of(name)

    @property
    def draw_settings(self) -> DrawSettings:
        return draw_settings(self.recipe)

    @property
    def drawn_now(self) -> Rollouts:
        """How this step's samples are drawn."""
        return self.rollouts if self.rollouts is not None and self.rollouts.on else Rollouts(self.draw_settings)


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
    updates = job.recipe.rollout.updates
    options = with_updates(spec.options, updates)

    def drawn(calls: int, c: Coefficients) -> Plan:
        return rule(calls, job.global_batch, c, generator, **options)

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
    if updates > 1 and plan.turn is None:
        text = f"the plug-in's rule {spec.rule} was asked for the live calls of {updates} updates, and returned no turn"
        raise PluginFault(text, remedy="return Plan(mode, weight, turn=…); see docs/plugins.md")
    if plan.repeats is not None and job.recipe.gradient.weight_sharpness:
        text = f"the plug-in's rule {spec.rule} repeats calls, and gradient.weight_sharpness makes live calls again"
        raise PluginFault(text, remedy="take one of them out")
    if not plan.is_one_step_deep() and not info.chained:
        text = f"the plug-in's rule {spec.rule} chains live calls and does not say so"
        raise PluginFault(text, remedy="write chained=True in its @gradient_rule(…); see docs/plugins.md")
    return plan


def slices_of(job: Job) -> range:
    """Numbers of the slices of the global batch that this process computes."""
    every = job.recipe.gradient_accumulation_steps * job.world.size
    return range(job.world.rank, every, job.world.size)


def slice_plan(job: Job, plan: Plan, part: int) -> Plan:
    """The part of a global batch's plan that slice ``part`` carries out."""
    size = job.recipe.train_batch_size
    return plan.rows(slice(part * size, (part + 1) * size), in_step=job.world.in_step)


def path_of(job: Job, step: int, mine: range, prompts: list[str]) -> Path:
    """How these samples of a step are drawn, and what their gradients are taken of."""
    recipe, drawn = job.recipe, job.drawn_now
    noise = draw_noise(job.family, drawn.settings, [keyed_generator(recipe.seed, "noise", step, s) for s in mine])
    # what is trained keeps its guidance when another network draws; a shorter schedule of its own may have less
    other = drawn.network is not None
    live = replace(drawn.settings, guidance_scale=recipe.guidance_scale) if other else drawn.settings
    condition, negative = encode_pair(job.embed, live, prompts)
    path = make_path(job.family, live, noise, condition, negative, recipe.gradient.negative_gradient, drawn.skips)
    if drawn.network is None:
        return path
    condition, negative = encode_pair(job.embed, drawn.settings, prompts)
    return replace(path, fast=Guided(drawn.network, condition, negative, drawn.settings.guidance))
