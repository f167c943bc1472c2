"""The package's own small CLIP and head have names of their own: what they score is no published measure."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import rewards as table
from sdo_cli.embedded import is_embedded
from sdo_cli.recipe.schema import Recipe, RewardSpec
from sdo_cli.recipe.steering_schema import Steering

# where a recipe names rewards, as in the identity of a run
PLACES = ("rewards", "validation.rewards", "guard.rewards")


def named(spec: RewardSpec, model: str) -> RewardSpec:
    """A reward as it is called where this model draws: ``clip-embedded`` where ``clip-score`` means the toy."""
    full = table.full_name(spec.name)
    filled = table.with_embedded(spec.name, spec.options) if is_embedded(model) else spec.options
    name, options = table.by_its_name(spec.name, filled)
    return replace(spec, name=name, options=options) if name != full or options != filled else spec


def name_of(spec: RewardSpec, model: str) -> str:
    """Its full name there, also where the parts of a mixture are not checked yet."""
    full = table.full_name(spec.name)
    return named(replace(spec, name=full), model).name if full in table.TOYS else full


def with_toys_named(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe, and a sentence on what is called otherwise in it."""
    given = [*recipe.rewards, *recipe.validation.rewards, *recipe.guard.rewards]
    model = recipe.model
    recipe = replace(
        recipe,
        rewards=_all(recipe.rewards, model),
        validation=replace(recipe.validation, rewards=_all(recipe.validation.rewards, model)),
        guard=replace(recipe.guard, rewards=_all(recipe.guard.rewards, model)),
    )
    return recipe, _said(given, model)


def steering_with_toys_named(spec: Steering) -> Steering:
    """The same of a recipe of `sdo optimize`."""

    objectives = []
    for item in spec.objectives:
        if item.kind == "reward" and item.reward is not None:
            reward = named(item.reward, spec.model)
            item = replace(item, name=reward.name, options=reward.options)
        objectives.append(item)
    return replace(spec, objectives=objectives, measures=_all(spec.measures, spec.model))


def tree_with_toys_named(run: dict[str, Any]) -> dict[str, Any]:
    """The same of what identifies a run, flat by dotted key."""
    found = {
        place: [spec | _as_dict(named(RewardSpec(**spec), str(run.get("model")))) for spec in run[place]]
        for place in PLACES
        if run.get(place)
    }
    return run | found


def with_names_of(recipe: Recipe, run: dict[str, Any]) -> Recipe:
    """The recipe with its rewards spelt as in a run begun before, whose tables go on under those names."""
    kept = {place: [RewardSpec(**spec) for spec in run[place]] for place in PLACES if run.get(place)}
    return replace(
        recipe,
        rewards=kept.get("rewards", recipe.rewards),
        validation=replace(recipe.validation, rewards=kept.get("validation.rewards", recipe.validation.rewards)),
        guard=replace(recipe.guard, rewards=kept.get("guard.rewards", recipe.guard.rewards)),
    )


def _all(specs: Iterable[RewardSpec], model: str) -> list[RewardSpec]:
    return [named(spec, model) for spec in specs]


def _as_dict(spec: RewardSpec) -> dict[str, Any]:
    return {"name": spec.name, "options": dict(spec.options)}


def _said(given: Iterable[RewardSpec], model: str) -> str:
    given = list(given)
    toys = dict.fromkeys(name for spec in given if (name := name_of(spec, model)) in table.TOYS.values())
    if toys and not is_embedded(model):
        return f"{', '.join(toys)}: by the package's own small CLIP, which knows emoji and no pictures of {model}"
    pairs = {spec.name: name for spec in given if (name := name_of(spec, model)) != table.full_name(spec.name)}
    names = ", ".join(f"{spelt} is {name}" for spelt, name in pairs.items())
    return f"rewards by the package's own small CLIP, to try things out: {names}" if pairs else ""
