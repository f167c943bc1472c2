"""What types cannot say: ranges, names that must exist, combinations that cannot be."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import rewards as reward_table
from sdo_cli import embedded
from sdo_cli.gradients.rules import RULES, known_names, option_problem, resolve
from sdo_cli.recipe.document import Key
from sdo_cli.recipe.prompts import read_prompts
from sdo_cli.recipe.reward_check import check_reward, check_rewards
from sdo_cli.recipe.rollout_check import Problem, check_rollout, check_timesteps, training_steps
from sdo_cli.recipe.rule_choice import AUTO as RULE_AUTO
from sdo_cli.recipe.schema import GuardSpec, PromptSource, Recipe
from sdo_cli.recipe.sight_check import check_sight
from sdo_cli.recipe.toys import name_of
from sdo_cli.recipe.typed import suggestion
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, SOLVERS, STOCHASTIC, calls_of

AT_LEAST_ONE = (
    "max_train_steps",
    "max_skipped_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_inference_steps",
    "rollout.updates",
    "sight.views",
    "lora.rank",
    "optimizer_rank",
    "validation.num_prompts",
    "validation.seeds",
    "validation.batch_size",
    "guard.num_prompts",
    "guard.seeds",
    "guard.patience",
)
NOT_NEGATIVE = (
    "seed",
    "lr_warmup_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "adam_weight_decay",
    "kl_weight",
    "kl_gate",
    "eta",
    "guidance_scale",
    "lora.alpha",
    "rollout.eta",
    "validation.grid_steps",
    "validation.grid_prompts",
    "guard.steps",
    "rollout.num_inference_steps",
    "rollout.drift_steps",
    "rollout.max_drift",
    "rollout.max_change",
    "rollout.proximal",
    "sight.noise",
    "sight.jpeg",
    "sight.lower_bound",
    "sight.sharpness",
    "gradient.weight_sharpness",
    "gradient.rollout_micro_batch",
    "gradient.score_micro_batch",
    "gradient.shortcut_micro_batch",
)
# accelerate's
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "aim", "dvclive", "swanlab")
POSITIVE = ("learning_rate", "adam_epsilon", "max_grad_norm")
FRACTIONS = ("adam_beta1", "adam_beta2", "optimizer_beta", "ema_decay")


def _value(recipe: Recipe, dotted: str) -> Any:
    place: Any = recipe
    for part in dotted.split("."):
        place = getattr(place, part)
    return place


def check_recipe(recipe: Recipe, beside: Path | None, problem: Problem) -> None:
    """Report everything that is wrong with a well-typed recipe."""
    check_ranges(recipe, problem)
    check_rewards(recipe, problem)
    check_gradient(recipe, problem)
    check_rollout(recipe, beside, problem)
    check_training(recipe, problem)
    check_decoder(recipe, problem)
    check_sight(recipe, problem)
    if recipe.solver not in (AUTO, *SOLVERS):
        problem(("solver",), f"unknown solver {recipe.solver!r}; {suggestion(recipe.solver, [AUTO, *SOLVERS])}")
    elif recipe.eta > 0 and recipe.solver not in (AUTO, *STOCHASTIC):
        problem(("eta",), f"is the noise of {', '.join(STOCHASTIC)}; solver {recipe.solver} takes none, write 0")
    check_timesteps(recipe.timesteps, recipe.num_inference_steps, (), problem)
    if recipe.timesteps is not None and recipe.rollout.skip_plan is not None:
        problem(("timesteps",), "a skip plan was made for steps of its own; take one of them out")
    if recipe.eta > 1:
        problem(("eta",), f"must be between 0 and 1, not {recipe.eta}")
    for side in ("height", "width"):
        if (pixels := getattr(recipe, side)) is not None and (pixels < 8 or pixels % 8):
            problem((side,), f"must be a multiple of 8, not {pixels}")
    trained, held = check_prompts(recipe.prompts, ("prompts",), beside, problem), []
    if recipe.validation.prompts != PromptSource():
        key = ("validation", "prompts")
        held = check_prompts(recipe.validation.prompts, key, beside, problem)
        if both := sorted(set(trained) & set(held)):
            problem(key, f"{len(both)} held-out prompts are trained on, for example {both[0]!r}; take them out of one")
    elif recipe.validation.rewards:
        problem(("validation", "rewards"), "there are no validation.prompts to measure on; add them")
    guided = recipe.validation.base_guidance_scale
    if guided is not None and not 0 <= guided < math.inf:
        problem(("validation", "base_guidance_scale"), f"must be a number from 0, not {guided}")
    elif guided is not None and recipe.validation.prompts == PromptSource():
        why = "there are no validation.prompts to draw; add them, or take this out"
        problem(("validation", "base_guidance_scale"), why)
    check_guard(recipe, {"trained on": trained, "held out for the end": held}, beside, problem)
    for index, name in enumerate(recipe.trackers):
        if name not in TRACKERS:
            problem(("trackers", str(index)), f"unknown tracker {name!r}; {suggestion(name, list(TRACKERS))}")


def check_ranges(recipe: Recipe, problem: Problem) -> None:
    rules: list[tuple[Any, Callable[[float], bool], str]] = [
        (AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        (POSITIVE, lambda v: v > 0, "must be more than 0"),
        (FRACTIONS, lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
    ]
    for names, holds, text in rules:
        for name in names:
            value = _value(recipe, name)
            # `not holds` also catches NaN
            if not holds(value) or value == float("inf"):
                problem(tuple(name.split(".")), f"{text}, not {value}")
    if recipe.num_inference_steps > MOST_STEPS:
        problem(("num_inference_steps",), f"must be at most {MOST_STEPS}, not {recipe.num_inference_steps}")


def check_guard(recipe: Recipe, taken: dict[str, list[str]], beside: Path | None, problem: Problem) -> None:
    """Prompts of its own, and rewards that are neither trained on nor kept for measuring.

    Args:
        taken: prompts it may not have, by what they are for.
    """
    spec = recipe.guard
    if not spec.steps:
        for name in ("prompts", "rewards", "stop"):
            if getattr(spec, name) != getattr(GuardSpec(), name):
                problem(("guard", name), "there are no checks without guard.steps; write for example steps: 20")
                return
        return
    if spec.prompts == PromptSource():
        problem(("guard", "prompts"), "checks need prompts of their own, neither trained on nor held out; add them")
    else:
        mine = check_prompts(spec.prompts, ("guard", "prompts"), beside, problem)
        if mine and min(len(mine), spec.num_prompts) < 2:
            problem(("guard", "prompts"), "checks need two prompts or more: one has no spread to measure a change in")
        for what, others in taken.items():
            if both := sorted(set(mine) & set(others)):
                problem(("guard", "prompts"), f"{len(both)} are {what}, for example {both[0]!r}; take them out of one")
    trained = {name_of(item, recipe.model) for item in recipe.rewards}
    if not spec.rewards:
        problem(("guard", "rewards"), "is empty; name rewards that are not trained on, for example clip or aesthetic")
    for index, item in enumerate(spec.rewards):
        key, full = ("guard", "rewards", str(index)), name_of(item, recipe.model)
        check_reward(item, key, problem)
        if reward_table.is_measure_only(full) or "embedded:judge" in item.options.values():
            problem((*key, "name"), f"{item.name} only measures, nothing is selected by it; use another reward")
        elif full in trained:
            problem((*key, "name"), f"{item.name} is trained on; the guard needs a reward that is not")
        elif full in [name_of(other, recipe.model) for other in spec.rewards[:index]]:
            problem((*key, "name"), f"{item.name} is in the list twice; give it once")


def check_gradient(recipe: Recipe, problem: Problem) -> None:
    spec = recipe.gradient
    if not resolve(spec.rule):
        names = [RULE_AUTO, *known_names()]
        known = suggestion(spec.rule, names)
        said = f"unknown gradient rule {spec.rule!r}; {known}; one of your own comes with --plugin FILE.py"
        problem(("gradient", "rule"), said)
        return
    info = RULES[spec.rule]
    if info.latents_only:
        problem(("gradient", "rule"), f"{spec.rule} has no gradient for weights, only for latents; choose another")
    if info.chained:
        for stage in ("rollout", "score", "shortcut"):
            if getattr(spec, name := f"{stage}_micro_batch"):
                why = f"{spec.rule} is one graph without stages; lower train_batch_size and accumulate instead"
                problem(("gradient", name), why)
    elif spec.checkpointing != "calls":
        why = f"is for rules that chain steps; {spec.rule} has none to recompute, use gradient_checkpointing"
        problem(("gradient", "checkpointing"), why)
    wrong = {name: text for name, value in spec.options.items() if (text := wrong_option(name, value, spec.rule))}
    for name, text in wrong.items():
        problem(("gradient", "options", name), text)
    solver, steps = recipe.rollout.solver or recipe.solver, training_steps(recipe)
    if not wrong and steps >= 1 and (text := option_problem(spec.rule, spec.options, calls_of(solver, steps))):
        problem(("gradient", "options"), text)


def check_decoder(recipe: Recipe, problem: Problem) -> None:
    """A small decoder has to be named, and serves those that are not full."""
    name = recipe.tiny_decoder
    if recipe.decoder == "full":
        if name is not None:
            problem(("tiny_decoder",), "is for decoder: tiny or tiny-jacobian; write one of them, or take this out")
        return
    if recipe.vae_tiling:
        problem(("vae_tiling",), f"cuts the model's own decoder up; with decoder {recipe.decoder} leave it out")
    if name is None and not embedded.is_embedded(recipe.model):
        made_for = "taesd (SD 1.x, 2.x), taesdxl (SDXL), taesd3 (SD 3), a folder or a hub id"
        problem(("tiny_decoder",), f"is missing, and decoder {recipe.decoder} needs it; write {made_for}")
    elif name is not None and embedded.is_embedded(name) and name not in ("embedded", "embedded:tiny"):
        problem(("tiny_decoder",), f"there is no embedded small decoder {name}; write embedded:tiny")


def check_training(recipe: Recipe, problem: Problem) -> None:
    """What is trained, and what goes with it."""
    check_optimizer(recipe, problem)
    if recipe.lora.layers != "attention" and recipe.lora.target_modules:
        problem(("lora", "layers"), "and lora.target_modules both say which layers; take one out")
    if recipe.train == "lora":
        return
    if recipe.kl_weight:
        problem(("kl_weight",), "needs the base model beside the trained one; with train: full there is none, write 0")
    for name in ("text_encoder", "start_from", "layers", "target_modules", "kohya"):
        if getattr(recipe.lora, name) not in (None, False, "attention"):
            problem(("lora", name), "belongs to train: lora; with train: full there is no adapter, take it out")


def check_optimizer(recipe: Recipe, problem: Problem) -> None:
    """What an optimizer can step, and whose keys are whose."""
    if recipe.optimizer == "schedulefree":
        if recipe.lr_scheduler != "constant":
            problem(("lr_scheduler",), "is what schedulefree does without; write constant (lr_warmup_steps may stay)")
        if recipe.ema_decay:
            problem(("ema_decay",), "schedulefree keeps a running mean of its own; write 0")
    if recipe.optimizer != "mofasgd":
        for item in fields(Recipe):
            if item.name.startswith("optimizer_") and getattr(recipe, item.name) != item.default:
                problem((item.name,), f"belongs to optimizer: mofasgd; with {recipe.optimizer} take it out")
        return
    if recipe.train == "lora":
        why = "mofasgd keeps a momentum of low rank for whole weights; a LoRA's are of low rank already"
        problem(("optimizer",), f"{why}, write adamw, or train: full")
    if recipe.mixed_precision == "fp16":
        why = "mofasgd frees gradients before a loss scaler could look at them"
        problem(("mixed_precision",), f"{why}; write bf16 or no, or optimizer: adamw")
    if recipe.rollout.drift_steps:
        why = "compares whole gradients, which mofasgd never has"
        problem(("rollout", "drift_steps"), f"{why}; write 0, or optimizer: adamw")


def wrong_option(name: str, value: Any, rule: str) -> str | None:
    """What is wrong with one option of a gradient rule, or None."""
    allowed = RULES[rule].options
    if name not in allowed:
        text = suggestion(name, list(allowed)) if allowed else f"{rule} takes none"
        return f"unknown option; {text} (sdo recipe explain gradient.options)"
    expected = allowed[name]
    if isinstance(expected, tuple):
        return None if value in expected else f"{value!r} is not one of {', '.join(map(str, expected))}"
    # YAML's 1 is as good a number as 1.0
    fits = type(value) is expected or (expected is float and type(value) is int)
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}[expected]
    return None if fits else f"must be {wanted}, not {value!r}"


def check_prompts(source: PromptSource, key: Key, beside: Path | None, problem: Problem) -> list[str]:
    """The prompts; none where there is a problem."""
    try:
        return read_prompts(source, beside)
    except ValueError as fault:
        problem((*key, "file") if source.file is not None else key, str(fault))
        return []
