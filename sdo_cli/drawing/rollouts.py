"""How a recipe's training draws: as it samples, or with fewer steps, or with a skip plan."""

from dataclasses import replace
from pathlib import Path

from sdo_cli.drawing.draw import DrawSettings, draw_settings
from sdo_cli.drawing.pruned import skips_of, with_plan
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.models.base import Family
from sdo_cli.recipe.rollout_check import rollout_plan_places
from sdo_cli.recipe.schema import Recipe
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
    settings = draw_settings(recipe)
    if recipe.rollout.num_inference_steps:
        settings = replace(settings, num_inference_steps=recipe.rollout.num_inference_steps)
    return settings if plan is None else with_plan(settings, plan)


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
