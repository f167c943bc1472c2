"""How a recipe's training draws: as it samples, with fewer steps, with a skip plan, or by a few-step LoRA."""

from dataclasses import replace
from pathlib import Path

from sdo_cli.drawing.draw import DrawSettings, draw_settings
from sdo_cli.drawing.pruned import skips_of, with_plan
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.models.base import Family
from sdo_cli.models.second_lora import load_second, network_with
from sdo_cli.recipe.rollout_check import rollout_plan_places
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.guidance import Network
from sdo_cli.skipping.skip_plan import SkipPlan, load_plan
from sdo_cli.skipping.walking import Skips


def rollout_plan(recipe: Recipe, beside: Path | None = None) -> SkipPlan | None:
    """The recipe's skip plan, looked up beside it and as given.

    Raises:
        RecipeFault: gone since the recipe was checked, or none that can be read.
    """
    name = recipe.rollout.skip_plan
    if name is None:
        return None
    path = next((place for place in rollout_plan_places(name, beside) if place.is_file()), None)
    if path is None:
        raise RecipeFault([f"rollout.skip_plan: no file {name} any more"])
    try:
        return load_plan(path)
    except EnvironmentFault as fault:
        raise RecipeFault([f"rollout.skip_plan: {fault.message}; {fault.remedy}"]) from fault


def rollout_settings(recipe: Recipe, plan: SkipPlan | None) -> DrawSettings:
    """The solver's settings of training, which may have fewer steps than sampling."""
    settings, spec = draw_settings(recipe), recipe.rollout
    if spec.lora is not None:
        return replace(
            settings,
            solver=spec.solver or settings.solver,
            eta=spec.eta,
            num_inference_steps=len(spec.timesteps or ()) or spec.num_inference_steps,
            timesteps=None if spec.timesteps is None else tuple(spec.timesteps),
            guidance_scale=1.0 if spec.guidance_scale is None else spec.guidance_scale,
        )
    if spec.num_inference_steps:
        settings = replace(settings, num_inference_steps=spec.num_inference_steps, timesteps=None)
    if spec.guidance_scale is not None:
        settings = replace(settings, guidance_scale=spec.guidance_scale)
    return settings if plan is None else with_plan(settings, plan)


def rollout_network(recipe: Recipe, family: Family) -> Network | None:
    """What draws training's pictures, where that is not the network that is trained; it has the trained adapter too.

    Raises:
        RecipeFault: the LoRA cannot be loaded, or takes other parts.
    """
    spec = recipe.rollout
    if spec.lora is None:
        return None
    if family.takes_guidance:
        raise RecipeFault([f"rollout.lora: {recipe.model} is itself made for few steps; take it out"])
    try:
        return network_with(family, load_second(family, spec.lora, scale=spec.lora_scale))
    except EnvironmentFault as fault:
        raise RecipeFault([f"rollout.lora: {fault.message}; {fault.remedy}"]) from fault


def rollout_skips(recipe: Recipe, plan: SkipPlan | None, family: Family, settings: DrawSettings) -> Skips | None:
    """The plan on the family's network.

    Raises:
        RecipeFault: made for another model, solver or number of steps.
    """
    if plan is None:
        return None
    try:
        return skips_of(plan, family, settings, exact=recipe.rollout.estimator == "exact")
    except EnvironmentFault as fault:
        raise RecipeFault([f"rollout.skip_plan: {fault.message}; {fault.remedy}"]) from fault
