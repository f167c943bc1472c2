"""What a recipe file says of one rule or of many steps, when the command line chooses another rule or fewer steps.

A value of the file that an override leaves no room for gives way, and that is said; what was typed is never changed.
"""

from collections.abc import Iterable
from dataclasses import replace

from sdo_cli.gradients.rules import RULES, resolve
from sdo_cli.recipe.rollout_check import most_updates
from sdo_cli.recipe.schema import LoraSpec, PromptSource, Recipe, RolloutSpec


def fitted(recipe: Recipe, file: Recipe, overrides: Iterable[str]) -> tuple[Recipe, list[str]]:
    """The recipe, and a sentence for everything that gave way.

    Args:
        file: what the recipe file says by itself.
        overrides: ``key=value`` from the command line.
    """
    typed, notes = {word.partition("=")[0] for word in overrides}, list[str]()
    for fit in (_options, _steps, _updates, _layers, _guided):
        recipe, note = fit(recipe, file, typed)
        notes += [note] if note else []
    return recipe, notes


def _typed(typed: set[str], place: str) -> bool:
    """Whether the command line says something of this key, or of what holds it."""
    parts = place.split(".")
    above = {".".join(parts[: n + 1]) for n in range(len(parts))}
    return bool(above & typed) or any(key.startswith(f"{place}.") for key in typed)


def _options(recipe: Recipe, file: Recipe, typed: set[str]) -> tuple[Recipe, str]:
    """Options of the file's rule that another one does not have."""
    rule, theirs, own = recipe.gradient.rule, recipe.gradient.options, file.gradient.options
    if rule == file.gradient.rule or not resolve(rule):
        return recipe, ""

    def is_files(key: str) -> bool:
        return own.get(key) == theirs[key] and f"gradient.options.{key}" not in typed

    kept = {key: value for key, value in theirs.items() if key in RULES[rule].options or not is_files(key)}
    if kept == theirs:
        return recipe, ""
    gone = ", ".join(key for key in theirs if key not in kept)
    gradient = replace(recipe.gradient, options=kept)
    return replace(recipe, gradient=gradient), f"gradient.options {gone} of {file.gradient.rule}: not for {rule}"


def _steps(recipe: Recipe, file: Recipe, typed: set[str]) -> tuple[Recipe, str]:
    """Training's own shorter rollouts, where sampling is shorter still."""
    own, sampling = recipe.rollout.num_inference_steps, recipe.num_inference_steps
    fewer = own > sampling and file.rollout.num_inference_steps <= file.num_inference_steps
    if not fewer or recipe.rollout.lora is not None or _typed(typed, "rollout.num_inference_steps"):
        return recipe, ""
    note = f"rollout.num_inference_steps {own} of the recipe: more than the {sampling} of sampling, which are taken"
    return replace(recipe, rollout=replace(recipe.rollout, num_inference_steps=0)), note


def _updates(recipe: Recipe, file: Recipe, typed: set[str]) -> tuple[Recipe, str]:
    """More updates than the rule and the steps have live calls for."""
    spec = recipe.rollout
    if spec.updates <= 1 or spec.updates != file.rollout.updates or _typed(typed, "rollout.updates"):
        return recipe, ""
    most = most_updates(recipe)
    if most is None or most >= spec.updates or not typed:
        return recipe, ""
    plain = RolloutSpec()
    limits = {name: getattr(plain, name) for name in ("max_change", "proximal", "rescore")} if most == 1 else {}
    note = f"rollout.updates {spec.updates} of the recipe: {most} with {recipe.gradient.rule} and these steps"
    return replace(recipe, rollout=replace(spec, updates=most, **limits)), note


def _layers(recipe: Recipe, file: Recipe, typed: set[str]) -> tuple[Recipe, str]:
    """Layers of the file's adapter, where others are named or there is none."""
    spec, usual = recipe.lora, LoraSpec().layers
    if spec.layers == usual or spec.layers != file.lora.layers or _typed(typed, "lora.layers"):
        return recipe, ""
    if spec.target_modules and not file.lora.target_modules:
        why = "lora.target_modules names others"
    elif recipe.train != "lora" and file.train == "lora":
        why = "with train: full there is no adapter"
    else:
        return recipe, ""
    return replace(recipe, lora=replace(spec, layers=usual)), f"lora.layers {spec.layers} of the recipe: {why}"


def _guided(recipe: Recipe, file: Recipe, typed: set[str]) -> tuple[Recipe, str]:
    """A comparison on held-out prompts that were taken away; nothing to be said of it."""
    spec = recipe.validation
    if spec.base_guidance_scale is None or spec.prompts != PromptSource() or file.validation.prompts == PromptSource():
        return recipe, ""
    if _typed(typed, "validation.base_guidance_scale"):
        return recipe, ""
    return replace(recipe, validation=replace(spec, base_guidance_scale=None)), ""
