"""What is compared: gradient rules with options, written ``rule`` or ``rule:option=value,…``.

An option that begins with ``rollout.`` is the recipe's: how training draws; so are ``decoder`` and ``tiny_decoder``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.rules import RULES
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.recipe.schema import Recipe
from sdo_cli.recipe.typed import suggestion

# Every rule for weights; SDO's relatives: one step per batch, the last step, more steps per sample.
STANDARD_RULES = (
    "full:checkpointing=none",
    "full:checkpointing=blocks",
    "full",
    "draft-k:k=1",
    "draft-k:k=5",
    "draft-lv",
    "alignprop",
    "refl",
    "drtune",
    "flowbp-sparse",
    "bridge",
    "lagrange",
    "leapalign",
    "sdo",
    "sdo:steps_per_sample=2",
    "sdo:steps_per_sample=4",
    "sdo:step_choice=per-batch",
    "sdo:step_choice=weight-proportional",
    "sdo:step_choice=late-biased",
)
ROLLOUT = "rollout."
DECODERS = ("decoder", "tiny_decoder")
QUICK_RULES = ("full:checkpointing=blocks", "draft-k:k=1", "refl", "drtune", "sdo", "sdo:steps_per_sample=2")


@dataclass(frozen=True)
class Variant:
    """One line of the tables.

    Attributes:
        name: as the user wrote it.
        overrides: recipe overrides that select it.
    """

    name: str
    overrides: tuple[str, ...]

    @property
    def rule(self) -> str:
        return self.name.partition(":")[0]

    def checkpointing(self, recipe: Recipe) -> str:
        """What its live calls recompute: ``none``, ``blocks`` or ``calls``."""
        if RULES[self.rule].chained:
            return recipe.gradient.checkpointing
        return "blocks" if recipe.gradient_checkpointing else "none"

    @property
    def own_rollouts(self) -> bool:
        """Whether it draws, or decodes, otherwise than the recipe that all variants share."""
        return any(_is_recipes(word.partition("=")[0]) for word in self.options)

    @property
    def options(self) -> list[str]:
        return [word for word in self.name.partition(":")[2].split(",") if word]

    @property
    def plan_name(self) -> str:
        """The name without what does not change the gradient."""
        rule, kept = self.rule, [word for word in self.options if not _only_cost(word.partition("=")[0])]
        return f"{rule}:{','.join(kept)}" if kept else rule


def parse_variant(text: str) -> Variant:
    """``sdo:steps_per_sample=2`` to a variant; options are checked when its recipe is loaded.

    Raises:
        RecipeFault: no such rule, or not ``option=value``.
    """
    rule, _, options = text.partition(":")
    if rule not in RULES:
        raise RecipeFault([f"--rule {text}: unknown gradient rule {rule!r}; {suggestion(rule, list(RULES))}"])
    overrides = [f"gradient.rule={rule}", "gradient.options={}"]
    # a rule's name alone is one update per rollout, whatever the recipe has
    overrides += ["rollout.updates=1", "rollout.max_change=0", "rollout.proximal=0", "rollout.rescore=false"]
    if RULES[rule].chained:
        overrides += [f"gradient.{stage}_micro_batch=0" for stage in ("rollout", "score", "shortcut")]
        # its own `checkpointing` says what is recomputed
        overrides.append("gradient_checkpointing=false")
    else:
        overrides.append("gradient.checkpointing=calls")
    for word in filter(None, options.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeFault(
                [f"--rule {text}: {word!r} is not option=value; write for example sdo:steps_per_sample=2"]
            )
        overrides.append(f"{_place(key)}={value}")
    return Variant(text, tuple(overrides))


def _place(option: str) -> str:
    """Where a variant's option stands in the recipe."""
    if _is_recipes(option):
        return option
    return f"gradient.{option}" if _only_cost(option) else f"gradient.options.{option}"


def _is_recipes(option: str) -> bool:
    return option.startswith(ROLLOUT) or option in DECODERS


def _only_cost(option: str) -> bool:
    """Whether it changes time and memory and not the gradient."""
    return option == "checkpointing" or option.endswith("_micro_batch")


def plain_full(names: Iterable[str]) -> str | None:
    """The first ``full`` among them that draws as the recipe does: what gradients are compared with."""
    variants = (Variant(name, ()) for name in names)
    return next((variant.name for variant in variants if variant.rule == "full" and not variant.own_rollouts), None)


def load_variants(recipe: str, overrides: Iterable[str], names: Iterable[str]) -> dict[Variant, LoadedRecipe]:
    """Every variant with its checked recipe.

    Raises:
        RecipeFault: an unknown rule or option, a rule that trains no weights, the same line twice.
    """
    names = list(names)
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise RecipeFault([f"--rule {twice[0]}: is in the list twice; give it once"])
    variants = [parse_variant(name) for name in names]
    loaded = {}
    for variant in variants:
        try:
            loaded[variant] = load_recipe(recipe, [*overrides, *variant.overrides])
        except RecipeFault as fault:
            raise RecipeFault(fault.problems, what=f"recipe with --rule {variant.name}") from fault
        if loaded[variant].recipe.train != "lora":
            raise RecipeFault(["train: the bench gives every rule a fresh adapter; write lora"])
        if loaded[variant].recipe.rollout.max_change:
            text = "rollout.max_change: the bench counts beforehand how often is drawn, which this leaves open; write 0"
            raise RecipeFault([text], what=f"recipe with --rule {variant.name}")
        if loaded[variant].recipe.rollout.drift_steps:
            text = "rollout.drift_steps: the bench counts every step alike, and a look at drift is two; write 0"
            raise RecipeFault([text], what=f"recipe with --rule {variant.name}")
    _check_compile(loaded)
    return loaded


def _check_compile(loaded: dict[Variant, LoadedRecipe]) -> None:
    """Raises RecipeFault when blocks of one compiled network would be switched for some rules and not for others."""
    pruned = [variant.name for variant, item in loaded.items() if item.recipe.rollout.skip_plan is not None]
    plans = {item.recipe.rollout.skip_plan for item in loaded.values()}
    if pruned and len(plans) > 1 and next(iter(loaded.values())).recipe.compile != "none":
        text = f"compile: all rules share one network, and the skip plan of {pruned[0]} switches its blocks"
        raise RecipeFault([f"{text}; write compile=none, or give this --rule alone"])
