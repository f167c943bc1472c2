"""From a recipe to how often its parts run: the gradient rule is asked for plans, as training asks it."""

from statistics import mean

import torch

from sdo_cli.device import dtype_of
from sdo_cli.drawing.draw import branches, decode_batch, draw_settings, make_route
from sdo_cli.drawing.prompts import ENCODE_BATCH
from sdo_cli.drawing.rollouts import rollout_plan, rollout_settings, rollout_skips
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.cost import META
from sdo_cli.estimate.network import Recompute
from sdo_cli.estimate.pipelines import plain_family
from sdo_cli.estimate.scoring import RewardSetup
from sdo_cli.estimate.stages import LiveCalls, Workload
from sdo_cli.estimate.units import call_shares
from sdo_cli.gradients.counts import LIVE, counts, held_at_once
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import RULES, find_rule, with_updates
from sdo_cli.gradients.skipped import plan_among_computed
from sdo_cli.models.base import Family
from sdo_cli.models.load import source_of
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.sampling.coefficients import Coefficients, coefficients_of
from sdo_cli.seeding import keyed_generator
from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.weights.needs import reward_options, reward_specs

# rules draw at random: counts are means over this many plans
PLANS = 16


def workload_of(loaded: LoadedRecipe, *, on_cpu: bool) -> Workload:
    """What :func:`sdo_cli.estimate.stages.estimate` has to know about a recipe.

    Raises:
        EnvironmentFault: a model whose architecture is not known on this machine.
        RecipeFault: a size or solver the model does not take.
    """
    recipe = loaded.recipe
    family = plain_family(source_of(recipe), dtype_of(recipe.mixed_precision))
    skipping = rollout_plan(recipe, loaded.folder)
    plans = draw_plans(recipe, family, skipping)
    recompute = _checkpointing(recipe)
    size, regularised = recipe.train_batch_size, bool(recipe.kl_weight)
    drawn = [
        counts(
            plan,
            recompute,
            slice_size=size,
            regularised=regularised,
            updates=recipe.rollout.updates,
            rescored=recipe.rollout.rescore,
            sharp=recipe.gradient.weight_sharpness > 0,
            drawn_by_other=recipe.rollout.lora is not None
            or (skipping is not None and recipe.rollout.estimator == "whole"),
            **_shares(family, recipe, plan, skipping),
        )
        for plan in plans
    ]
    usual = {name: mean(count.get(name, 0.0) for count in drawn) for name in ("call", "score", *LIVE.values())}
    shape = family.latent_shape(recipe.height, recipe.width)
    held_out = _held_out(loaded)
    return Workload(
        calls=usual["call"],
        scores=usual["score"],
        live=tuple(_live(recipe, key, usual[name]) for key, name in LIVE.items() if usual[name]),
        chained=max(held_at_once(plan, size) for plan in plans),
        rewards=tuple(_setup(spec, recipe) for spec in recipe.rewards),
        measured=_only_measured(recipe),
        prompts=len(dict.fromkeys(loaded.prompts(recipe.prompts))) + held_out + _guarded(loaded),
        encode_batch=ENCODE_BATCH,
        held_out=held_out * recipe.validation.seeds,
        checked=_guarded(loaded) * recipe.guard.seeds * _checks(recipe),
        decode_batch=decode_batch(family, torch.empty(1, *shape, device=META)),
        on_cpu=on_cpu,
    )


def _shares(family: Family, recipe: Recipe, plan: Plan, skipping: SkipPlan | None) -> dict[str, float]:
    """What a skip plan leaves of calls that are made, and of those that are run again as they were; or how many
    branches guidance has in them, where another network draws."""
    if recipe.rollout.lora is not None:
        of_rollouts = branches(family, rollout_settings(recipe, None))
        return {"rollout_share": of_rollouts / branches(family, draw_settings(recipe))}
    if skipping is None:
        return {}
    shares, exact = call_shares(recipe, skipping), recipe.rollout.estimator == "exact"
    live = float(shares[plan.live.nonzero()[:, 0]].mean()) if exact else 1.0
    return {"rollout_share": float(shares[: plan.calls_run].mean()), "live_share": live}


def draw_plans(recipe: Recipe, family: Family, skipping: SkipPlan | None = None) -> list[Plan]:
    """Plans of the recipe's rule for its whole batch."""
    spec, batch = recipe.gradient, recipe.global_batch()
    settings = rollout_settings(recipe, skipping)
    skips = rollout_skips(recipe, skipping, family, settings)
    c, rule = coefficients_of(make_route(family, settings)), find_rule(spec.rule)
    options = with_updates(spec.options, recipe.rollout.updates)

    def drawn(generator: torch.Generator) -> Plan:
        def shown(calls: int, c: Coefficients) -> Plan:
            return rule(calls, batch, c, generator, **options)

        if skips is not None and skips.exact:
            return plan_among_computed(shown, c, skips.plan.sources)
        return shown(c.calls, c)

    try:
        return [drawn(keyed_generator(recipe.seed, "plan", step)) for step in range(PLANS)]
    except ValueError as fault:
        raise RecipeFault([f"gradient: {fault}"]) from fault


def _checkpointing(recipe: Recipe) -> str:
    """What live calls recompute, as :func:`sdo_cli.gradients.counts.counts` calls it."""
    if RULES[recipe.gradient.rule].chained:
        return recipe.gradient.checkpointing
    return "blocks" if recipe.gradient_checkpointing else "none"


def _live(recipe: Recipe, key: tuple[bool, str], number: float) -> LiveCalls:
    through, recomputed = key
    blocks = recomputed == "blocks" or recipe.gradient_checkpointing
    return LiveCalls(number, through, Recompute(blocks=blocks, call=recomputed == "calls"))


def _setup(spec: RewardSpec, recipe: Recipe) -> RewardSetup:
    return RewardSetup.of(spec.name, reward_options(spec, recipe))


def _only_measured(recipe: Recipe) -> tuple[RewardSetup, ...]:
    """Rewards beside the trained ones, each once."""
    trained = {_setup(spec, recipe) for spec in recipe.rewards}
    found = dict.fromkeys(_setup(spec, recipe) for spec in reward_specs(recipe))
    return tuple(setup for setup in found if setup not in trained)


def _guarded(loaded: LoadedRecipe) -> int:
    """Number of prompts a check draws."""
    spec = loaded.recipe.guard
    return min(len(loaded.prompts(spec.prompts)), spec.num_prompts) if spec.steps else 0


def _checks(recipe: Recipe) -> int:
    """One before training, then every so many steps, and one at the end."""
    return 1 + -(-recipe.max_train_steps // recipe.guard.steps) if recipe.guard.steps else 0


def _held_out(loaded: LoadedRecipe) -> int:
    """Number of validation prompts."""
    spec = loaded.recipe.validation
    return 0 if spec.prompts == PromptSource() else min(len(loaded.prompts(spec.prompts)), spec.num_prompts)
