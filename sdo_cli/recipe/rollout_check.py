"""What types cannot say of rollouts that cost less than sampling."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdo_cli.gradients.rules import RULES
from sdo_cli.recipe.document import Key
from sdo_cli.recipe.schema import Recipe, RolloutSpec
from sdo_cli.recipe.typed import suggestion
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, NOISY_SOLVERS, SOLVERS, STOCHASTIC, calls_of

Problem = Callable[[Key, str], Any]


def training_steps(recipe: Recipe) -> int:
    """Solver steps of a rollout; a skip plan may have its own."""
    return len(recipe.rollout.timesteps or ()) or recipe.rollout.num_inference_steps or recipe.num_inference_steps


def check_rollout(recipe: Recipe, beside: Path | None, problem: Problem) -> None:
    """Cheaper rollouts, and the rules that can use them."""
    spec = recipe.rollout
    if spec.num_inference_steps > MOST_STEPS:
        problem(("rollout", "num_inference_steps"), f"must be at most {MOST_STEPS}, not {spec.num_inference_steps}")
    check_fast(recipe, problem)
    shorter = (
        spec.skip_plan is not None
        or spec.lora is not None
        or spec.num_inference_steps not in (0, recipe.num_inference_steps)
    )
    check_updates(recipe, problem)
    if spec.drift_steps and not shorter and spec.updates == 1 and recipe.decoder != "tiny":
        problem(("rollout", "drift_steps"), "training draws in full: there is nothing to drift; give a skip_plan")
    if spec.max_drift and not spec.drift_steps:
        problem(("rollout", "max_drift"), "is looked at every drift_steps; write for example drift_steps: 20")
    takes_noise = recipe.eta > 0 or recipe.solver in NOISY_SOLVERS
    if (
        spec.lora is None
        and shorter
        and spec.drift_steps
        and (takes_noise or (ends_early(recipe) and spec.num_inference_steps))
    ):
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


def most_updates(recipe: Recipe) -> int | None:
    """For how many updates a rollout has live calls; None where rule or steps are wrong by themselves."""
    spec, options = recipe.rollout, recipe.gradient.options
    info = RULES.get(recipe.gradient.rule)
    if info is None:
        return None
    if info.replays is None or options.get("step_choice") in ("first", "last", "fixed"):
        return 1
    try:
        each, there = info.replays(options, calls_of(spec.solver or recipe.solver, training_steps(recipe)))
        return max(1, there // max(1, each))
    except (KeyError, TypeError, ValueError):
        return None


def check_updates(recipe: Recipe, problem: Problem) -> None:
    """Several updates per rollout, and the rules that can share their live calls out among them."""
    spec, rule, options = recipe.rollout, recipe.gradient.rule, recipe.gradient.options
    if spec.updates <= 1:
        for name in ("max_change", "proximal", "rescore"):
            if getattr(spec, name):
                why = "is about updates after a rollout's first, and there is one; give rollout.updates too, 4 say"
                problem(("rollout", name), why)
        return
    info = RULES.get(rule)
    if info is None:
        return
    if info.replays is None:
        why = f"is for rules whose steps stand alone, and {rule} " + (
            "chains its steps" if info.chained else "is about one step only" if info.function is None else "takes none"
        )
        problem(("rollout", "updates"), f"{why}; use sdo, or write 1")
        return
    if options.get("step_choice") in ("first", "last", "fixed"):
        why = f"shares steps out among updates, and step_choice {options['step_choice']} always takes the same one"
        problem(("rollout", "updates"), f"{why}; choose another, or write 1")
    elif rule == "sdo" and spec.rescore and options.get("weights", "true/p") != "true/p":
        problem(
            ("rollout", "rescore"), f"needs weights true/p, not {options['weights']}: they say where the path leads"
        )
    elif rule != "sdo" and spec.rescore:
        problem(("rollout", "rescore"), f"needs to know how likely a step was, which {rule} does not say; use sdo")
    most = most_updates(recipe)
    if most is not None and spec.updates > most:
        calls = calls_of(spec.solver or recipe.solver, training_steps(recipe))
        each, there = info.replays(options, calls)
        why = f"{spec.updates} updates of {each} live call{'s' * (each != 1)} a picture each, and there are {there}"
        problem(("rollout", "updates"), f"{why}; write at most {most}")


def check_fast(recipe: Recipe, problem: Problem) -> None:
    """A few-step LoRA that draws, and what it is drawn with."""
    spec = recipe.rollout
    if spec.lora is None:
        for name in ("lora_scale", "solver", "timesteps", "eta"):
            if getattr(spec, name) != getattr(RolloutSpec(), name):
                problem(("rollout", name), "says how rollout.lora draws; give that too, or take this out")
        check_own_guidance(recipe, problem)
        return
    if spec.skip_plan is not None:
        problem(("rollout", "lora"), "draws in few steps; a skip plan leaves parts of many out: take one of them")
    if recipe.train == "full":
        problem(("rollout", "lora"), "is an adapter beside the trained one; with train: full there is none")
    if recipe.compile != "none":
        problem(("rollout", "lora"), "is switched on and off between calls, which compiled ones are not; compile: none")
    made_for = "write the one it was made for: lcm (LCM), tcd (TCD), euler (Lightning), ddim (Hyper-SD)"
    if spec.solver is None:
        problem(("rollout", "solver"), f"is missing, and a LoRA file names no sampler; {made_for}")
    elif spec.solver not in (AUTO, *SOLVERS):
        problem(("rollout", "solver"), f"unknown solver {spec.solver!r}; {suggestion(spec.solver, [AUTO, *SOLVERS])}")
    elif spec.eta > 0 and spec.solver not in (AUTO, *STOCHASTIC):
        problem(("rollout", "eta"), f"is for {', '.join(STOCHASTIC)}; solver {spec.solver} takes none, write 0")
    if spec.eta > 1:
        problem(("rollout", "eta"), f"must be between 0 and 1, not {spec.eta}")
    check_timesteps(spec.timesteps, spec.num_inference_steps or None, ("rollout",), problem)
    if not spec.num_inference_steps and not spec.timesteps:
        problem(("rollout", "num_inference_steps"), "is missing; write the number the LoRA was made for, 4 or so")
    if spec.guidance_scale is not None and not 0 <= spec.guidance_scale < float("inf"):
        problem(("rollout", "guidance_scale"), f"must be a number from 0, not {spec.guidance_scale}")
    if not abs(spec.lora_scale) < float("inf"):
        problem(("rollout", "lora_scale"), f"must be a number, not {spec.lora_scale}")
    info = RULES.get(recipe.gradient.rule)
    if info is not None and info.chained:
        why = f"{recipe.gradient.rule} sends gradients through whole rollouts, which another network drew; use sdo"
        problem(("rollout", "lora"), why)


def check_own_guidance(recipe: Recipe, problem: Problem) -> None:
    """The guidance of a shorter schedule of the model itself, which its calls with gradients have too."""
    spec, key = recipe.rollout, ("rollout", "guidance_scale")
    if spec.guidance_scale is None:
        return
    if not 1 < spec.guidance_scale < float("inf"):
        why = f"must be a number above 1, not {spec.guidance_scale}; to train without guidance write guidance_scale: 1"
        problem(key, why)
    elif recipe.guidance_scale <= 1:
        problem(key, f"sampling has no guidance (guidance_scale {recipe.guidance_scale:g}); take this out")
    elif not spec.num_inference_steps and spec.skip_plan is None:
        why = "is for training that draws in fewer calls; give rollout.num_inference_steps too, or set guidance_scale"
        problem(key, why)


def check_timesteps(timesteps: list[int] | None, steps: int | None, place: Key, problem: Problem) -> None:
    """As many as there are steps, falling; the model says what is the noisiest."""
    if timesteps is None:
        return
    key = (*place, "timesteps")
    if not timesteps:
        problem(key, "is empty; name one for every step, the noisiest first")
    elif any(a <= b for a, b in pairwise(timesteps)) or timesteps[-1] < 0:
        problem(key, f"must fall from the noisiest, as 999, 749, 499, 249; not {', '.join(map(str, timesteps))}")
    elif steps not in (None, len(timesteps)):
        problem(key, f"names {len(timesteps)} steps, num_inference_steps is {steps}; write the same")


def rollout_plan_places(name: str, beside: Path | None) -> list[Path]:
    """Where a recipe's skip plan is looked up."""
    return [*([beside / name] if beside else []), Path(name).expanduser()]


def ends_early(recipe: Recipe) -> bool:
    """Whether the reward sees something else than the final latent alone."""
    return recipe.gradient.rule in ("refl", "draft-lv", "drtune")
