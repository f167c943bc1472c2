"""Rewards and gradient rules given as objects: registered for this process, so that recipes can name them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.recipe.toys import with_toys_named


def with_objects(loaded: LoadedRecipe, rewards: Sequence[Any], rule: Callable[..., Any] | None) -> LoadedRecipe:
    """With objects in place of names: they are registered for this process."""
    recipe = loaded.recipe
    if rewards:
        specs = []
        for item in rewards:
            made, weight = item if isinstance(item, tuple) else (item, 1.0)
            specs.append(RewardSpec(registered_reward(made), weight=float(weight)))
        recipe = replace(recipe, rewards=specs)
    if rule is not None:
        name = registered_rule(rule)
        recipe = replace(recipe, gradient=replace(recipe.gradient, rule=name, options={}))
    if recipe is loaded.recipe:
        return loaded
    from sdo_cli.recipe.check import check_recipe

    wrong: list[str] = []
    check_recipe(recipe, loaded.folder, lambda key, text: wrong.append(f"{'.'.join(key)}: {text}"))
    if wrong:
        raise RecipeFault(wrong)
    recipe, said = with_toys_named(recipe)
    return replace(loaded, recipe=recipe, notes=tuple(dict.fromkeys([*loaded.notes, *([said] if said else [])])))


def registered_rule(rule: Callable[..., Any]) -> str:
    """The name of a function to a plan, by which a recipe knows it from now on."""
    from sdo_cli.gradients.rules import RULES, gradient_rule

    name = rule.__name__.replace("_", "-")
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
    if not callable(getattr(made, "score", None)):
        raise RecipeFault([f"rewards: {made!r} has no score(images, prompts)"], what="call")
    name = str(getattr(made, "name", "") or type(made).__name__)
    if name in table.TABLE or name in table.SHORT:
        raise RecipeFault([f"rewards: {name} is the name of a shipped reward; set .name to another"], what="call")
    summary = (type(made).__doc__ or "given as an object").splitlines()[0]
    table.FOREIGN[name] = Foreign(lambda: made, summary, "", "", (float("-inf"), float("inf")), True)
    table.OPTIONS[name], table.REQUIRED[name] = frozenset(), frozenset()
    return name
