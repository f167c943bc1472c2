"""What types cannot say of rollouts that cost less than sampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdo_cli.gradients.rules import RULES
from sdo_cli.recipe.document import Key
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.solvers import MOST_STEPS, NOISY_SOLVERS

Problem = Callable[[Key, str], Any]


def training_steps(recipe: Recipe) -> int:
    """Solver steps of a rollout; a skip plan may have its own."""
    return recipe.rollout.num_inference_steps or recipe.num_inference_steps


def check_rollout(recipe: Recipe, beside: Path | None, problem: Problem) -> None:
    """Cheaper rollouts, and the rules that can use them."""
    spec = recipe.rollout
    if spec.num_inference_steps > MOST_STEPS:
        problem(("rollout", "num_inference_steps"), f"must be at most {MOST_STEPS}, not {spec.num_inference_steps}")
    shorter = spec.skip_plan is not None or spec.num_inference_steps not in (0, recipe.num_inference_steps)
    if spec.drift_steps and not shorter:
        problem(("rollout", "drift_steps"), "training draws in full: there is nothing to drift; give a skip_plan")
    if spec.max_drift and not spec.drift_steps:
        problem(("rollout", "max_drift"), "is looked at every drift_steps; write for example drift_steps: 20")
    takes_noise = recipe.eta > 0 or recipe.solver in NOISY_SOLVERS
    if spec.drift_steps and (takes_noise or (ends_early(recipe) and spec.num_inference_steps)):
        why = "compares final latents of the same noise; with fresh noise, or a rule that ends early, there are none"
        problem(("rollout", "drift_steps"), why)
    if spec.skip_plan is None:
        return
    if spec.estimator == "exact" and recipe.gradient.options.get("step") is not None:
        why = "step is a call of the whole solver, and exact draws among the computed ones; write whole"
        problem(("rollout", "estimator"), why)
    if not any(place.is_file() for place in rollout_plan_places(spec.skip_plan, beside)):
        problem(("rollout", "skip_plan"), f"no file {spec.skip_plan}; it is looked for beside the recipe, and here")
    if takes_noise:
        how = f"solver {recipe.solver} adds some" if recipe.solver in NOISY_SOLVERS else f"eta is {recipe.eta}, write 0"
        problem(("rollout", "skip_plan"), f"leaves calls of a solver without noise out; {how}")
    info = RULES.get(recipe.gradient.rule)
    if info is not None and info.chained:
        why = f"{recipe.gradient.rule} sends gradients through whole rollouts; use sdo, or rollout.num_inference_steps"
        problem(("rollout", "skip_plan"), why)
    elif spec.estimator == "exact" and (ends_early(recipe) or recipe.gradient.options.get("as_epsilon")):
        why = "exact is for rules that end at the final latent, held in the network's output; write whole"
        problem(("rollout", "estimator"), why)


def rollout_plan_places(name: str, beside: Path | None) -> list[Path]:
    """Where a recipe's skip plan is looked up."""
    return [*([beside / name] if beside else []), Path(name).expanduser()]


def ends_early(recipe: Recipe) -> bool:
    """Whether the reward sees something else than the final latent alone."""
    return recipe.gradient.rule in ("refl", "draft-lv", "drtune")
