"""Rewards of a recipe: names, options, weights and losses."""

import math
from typing import Any

import rewards as reward_table
from sdo_cli import embedded
from sdo_cli.recipe.document import Key
from sdo_cli.recipe.rollout_check import Problem
from sdo_cli.recipe.schema import Recipe, RewardSpec
from sdo_cli.recipe.toys import name_of
from sdo_cli.recipe.typed import suggestion


def check_rewards(recipe: Recipe, problem: Problem) -> None:
    # the names are looked up in every installed package: only where somebody is told them
    if not recipe.rewards:
        problem(("rewards",), f"is empty; name at least one of {', '.join(reward_table.known_names())}")
    names = [name_of(spec, recipe.model) for spec in recipe.rewards]
    for index, spec in enumerate(recipe.rewards):
        key, full = ("rewards", str(index)), names[index]
        check_reward(spec, key, problem)
        if not reward_table.resolve(full):
            continue
        if full in names[:index]:
            problem((*key, "name"), f"{spec.name} is in the list twice; give it once, with the sum of the weights")
        if "embedded:judge" in spec.options.values():
            problem((*key, "options"), "the judge only measures, no recipe may train on it; use another model")
        if reward_table.is_measure_only(full):
            problem(
                (*key, "name"), f"{spec.name} only measures, no recipe may train on it; put it in validation.rewards"
            )
        check_loss(spec, key, problem)
        if spec.weight == 0 or not math.isfinite(spec.weight):
            problem((*key, "weight"), f"must be a number other than 0, not {spec.weight}")
    measured = recipe.validation.rewards
    for index, spec in enumerate(measured):
        place = ("validation", "rewards", str(index))
        check_reward(spec, place, problem)
        if _as_measured(spec, recipe) in [_as_measured(other, recipe) for other in measured[:index]]:
            problem((*place, "name"), f"{spec.name} is in the list twice; give it once")


def _as_measured(spec: RewardSpec, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Other options make another measure, but for the toys, which have none."""
    full = name_of(spec, recipe.model)
    return full, {} if full in reward_table.TOYS.values() else spec.options


def check_loss(spec: RewardSpec, key: Key, problem: Problem) -> None:
    """A target belongs to the losses that have one."""
    if spec.loss == "maximize" and spec.target is not None:
        problem((*key, "target"), "belongs to loss distance or hinge; loss maximize has none")
    if spec.loss != "maximize" and (spec.target is None or not math.isfinite(spec.target)):
        problem((*key, "loss"), f"{spec.loss} needs a target, the value the reward should reach")


def check_reward(spec: RewardSpec, key: Key, problem: Problem) -> None:
    """Its name and options."""
    full = reward_table.full_name(spec.name)
    if not reward_table.resolve(full):
        known = suggestion(spec.name, reward_table.known_names())
        problem((*key, "name"), f"unknown reward {spec.name!r}; {known}; one of your own comes with --plugin FILE.py")
        return
    if full == "mixture" and (wrong := wrong_bound(spec.options)):
        problem((*key, "options", "lower_bound"), wrong)
    for option in sorted(reward_table.REQUIRED.get(full, frozenset()) - set(spec.options)):
        problem((*key, "options"), f"{spec.name} needs the option {option}; write options: {{{option}: …}}")
    for option, value in spec.options.items():
        allowed = sorted(reward_table.OPTIONS[full])
        if option not in allowed:
            text = suggestion(option, allowed) if allowed else f"{spec.name} takes none"
            problem((*key, "options", option), f"unknown option; {text} (sdo recipe explain rewards.0.options)")
        elif wrong := wrong_reward_option(full, option, value):
            problem((*key, "options", option), wrong)
        elif (
            isinstance(value, str)
            and embedded.is_embedded(value)
            and value.partition(":")[2] not in ("", *embedded.FOLDERS)
        ):
            problem((*key, "options", option), f"no embedded model {value}; there are {', '.join(embedded.FOLDERS)}")


def wrong_reward_option(name: str, option: str, value: Any) -> str | None:
    """What is wrong with the value of one option of a reward, or None."""
    wanted = reward_table.TYPES.get((name, option), str)
    if wanted is list:
        return wrong_parts(value)
    if type(value) is wanted:
        return None
    # YAML's 1 is as good a number as 1.0
    if wanted is float and type(value) is int:
        return None
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return f"must be {words[wanted]}, not {value!r}"


def wrong_bound(options: dict[str, Any]) -> str | None:
    """What is wrong with the lower bound of a mixture, beside its type, or None."""
    bound, parts = options.get("lower_bound", 0.0), options.get("parts")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or bound == 0:
        return None
    if not 0 < bound < math.inf:
        return f"must be a number from 0, not {bound}"
    weights = [part.get("weight", 1.0) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    if any(isinstance(weight, int | float) and weight < 0 for weight in weights):
        return "needs weights above 0: of what counts against, no bound is low"
    return None


def wrong_parts(parts: Any) -> str | None:
    """What is wrong with the parts of a mixture, or None."""
    if not isinstance(parts, list) or not parts:
        return "must be a list with an entry {name, weight, mean, std, options} for each reward"
    for part in parts:
        if not isinstance(part, dict) or "name" not in part:
            return f"an entry needs a name, like {{name: clip, weight: 1.0}}; got {part!r}"
        if unknown := sorted(set(part) - {"name", "weight", "mean", "std", "options"}):
            return f"{part['name']}: unknown key {unknown[0]}; known: name, weight, mean, std, options"
        full = reward_table.full_name(str(part["name"]))
        if not reward_table.resolve(full) or full == "mixture":
            return f"unknown reward {part['name']!r}; {suggestion(str(part['name']), reward_table.known_names())}"
        if reward_table.is_measure_only(full):
            return f"{part['name']} only measures and cannot be part of a mixture"
        for number in ("weight", "mean", "std"):
            value = part.get(number, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return f"{part['name']}: {number} must be a number, not {value!r}"
        if part.get("std", 1.0) <= 0 or part.get("weight", 1.0) == 0:
            return f"{part['name']}: std must be more than 0 and weight other than 0"
        options = part.get("options") or {}
        if not isinstance(options, dict):
            return f"{part['name']}: options must be {{option: value}}, not {options!r}"
        if "embedded:judge" in options.values():
            return f"{part['name']}: the judge only measures, no recipe may train on it; use another model"
        for option, value in options.items():
            if option not in reward_table.OPTIONS[full]:
                return (
                    f"{part['name']}: unknown option {option}; known: {', '.join(sorted(reward_table.OPTIONS[full]))}"
                )
            if text := wrong_reward_option(full, option, value):
                return f"{part['name']}: {option} {text}"
    if len({reward_table.full_name(part["name"]) for part in parts}) < len(parts):
        return "names a reward twice; give it once, with the sum of the weights"
    return None
