"""Rewards and gradient rules given as objects: registered for this process, so that recipes can name them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.rules import resolve as resolve_rule
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.rollout_check import most_updates
from sdo_cli.recipe.schema import Recipe, RewardSpec, RolloutSpec
from sdo_cli.recipe.toys import with_toys_named


def with_objects(loaded: LoadedRecipe, rewards: Sequence[Any], rule: Callable[..., Any] | str | None) -> LoadedRecipe:
    """With objects in place of names: they are registered for this process."""
    recipe, notes = loaded.recipe, list(loaded.notes)
    if rewards:
        several = [rewards] if isinstance(rewards, str) else rewards
        recipe = replace(recipe, rewards=[spec_of(item) for item in several])
    if rule is not None:
        name = rule if isinstance(rule, str) else registered_rule(rule)
        recipe = replace(recipe, gradient=replace(recipe.gradient, rule=name, options={}))
        recipe, note = _with_fewer_updates(recipe)
        notes += [note] if note else []
    return loaded if recipe is loaded.recipe else _checked(replace(loaded, recipe=recipe, notes=tuple(notes)))


def measured_too(loaded: LoadedRecipe, measure: Sequence[Any]) -> LoadedRecipe:
    """With more rewards that are only measured."""
    if not measure:
        return loaded
    several = [measure] if isinstance(measure, str) else measure
    spec = loaded.recipe.validation
    more = [*spec.rewards, *(spec_of(item) for item in several)]
    return _checked(replace(loaded, recipe=replace(loaded.recipe, validation=replace(spec, rewards=more))))


def spec_of(item: Any) -> RewardSpec:
    """Of a name, an object, either with a weight, or a mapping as in a recipe."""
    if isinstance(item, Mapping):
        return RewardSpec(**{**item, "name": registered_reward(item.get("name"))})
    made, weight = item if isinstance(item, tuple) else (item, 1.0)
    return RewardSpec(registered_reward(made), weight=float(weight))


def unknown_objects(recipe: Recipe) -> list[str]:
    """Rewards and the rule of a recipe that nobody knows by name."""
    import rewards as table
    from sdo_cli.gradients.rules import resolve

    specs = (*recipe.rewards, *recipe.validation.rewards, *recipe.guard.rewards)
    names = dict.fromkeys(spec.name for spec in specs if not table.resolve(spec.name))
    return [*names, *([] if resolve(recipe.gradient.rule) else [f"the rule {recipe.gradient.rule}"])]


def _with_fewer_updates(recipe: Recipe) -> tuple[Recipe, str]:
    """A rule that serves one update a rollout has one, whatever the recipe had for its own."""
    most = most_updates(recipe) if resolve_rule(recipe.gradient.rule) else None
    if most is None or most >= recipe.rollout.updates:
        return recipe, ""
    plain = RolloutSpec()
    limits = {name: getattr(plain, name) for name in ("max_change", "proximal", "rescore")} if most == 1 else {}
    note = f"rollout.updates {recipe.rollout.updates} of the recipe: {most} with {recipe.gradient.rule}"
    return replace(recipe, rollout=replace(recipe.rollout, updates=most, **limits)), note


def _checked(loaded: LoadedRecipe) -> LoadedRecipe:
    """Raises RecipeFault for what is wrong with it."""
    recipe = loaded.recipe
    from sdo_cli.recipe.check import check_recipe

    wrong: list[str] = []
    check_recipe(recipe, loaded.folder, lambda key, text: wrong.append(f"{'.'.join(key)}: {text}"))
    if wrong:
        raise RecipeFault(wrong)
    recipe, said = with_toys_named(recipe)
    return replace(loaded, recipe=recipe, notes=tuple(dict.fromkeys([*loaded.notes, *([said] if said else [])])))


def registered_rule(rule: Callable[..., Any]) -> str:
    """The name of a function to a plan, by which a recipe knows it from now on.

    Raises:
        RecipeFault: it cannot be called.
    """
    if not callable(rule):
        raise RecipeFault([f"rule: {rule!r} is neither a rule's name nor a function to a plan"], what="call")
    from sdo_cli.gradients.rules import RULES, gradient_rule

    name = str(getattr(rule, "__name__", type(rule).__name__)).replace("_", "-")
    known = RULES.get(name)
    if known is not None and known.function is not None and known.function is not rule:
        # a cell that was run again
        del RULES[name]
    if known is None or known.function is not rule:
        gradient_rule(name, summary=(rule.__doc__ or "given as an object").splitlines()[0])(rule)
    return name


def registered_reward(made: Any) -> str:
    """The name of a reward object, by which a recipe knows it from now on.

    Raises:
        RecipeFault: no reward, or its name is a shipped reward's.
    """
    import rewards as table
    from rewards.registered import Foreign

    if isinstance(made, str):
        return made
    if isinstance(made, type):
        raise RecipeFault([f"rewards: {made.__name__} is a class; give an object, {made.__name__}()"], what="call")
    if not callable(getattr(made, "score", None)):
        raise RecipeFault([f"rewards: {made!r} has no score(images, prompts)"], what="call")
    name = str(getattr(made, "name", "") or type(made).__name__)
    if name in table.TABLE or name in table.SHORT:
        raise RecipeFault([f"rewards: {name} is the name of a shipped reward; set .name to another"], what="call")
    summary = (type(made).__doc__ or "given as an object").splitlines()[0]
    table.FOREIGN[name] = Foreign(lambda: made, summary, "", "", (float("-inf"), float("inf")), True)
    table.OPTIONS[name], table.REQUIRED[name] = frozenset(), frozenset()
    return name
