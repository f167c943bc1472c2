"""The gradient rules by name, and what each can be told. Imports no torch: recipes are checked against this."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdo_cli.gradients.plan import Rule


@dataclass(frozen=True)
class RuleInfo:
    """Attributes:
    module: where the function of the rule's name lives.
    options: keyword arguments a recipe may give: allowed words, or the type.
    """

    summary: str
    source: str
    module: str
    options: dict[str, tuple[str, ...] | type] = field(default_factory=dict)


RULES: dict[str, RuleInfo] = {
    "sdo": RuleInfo(
        summary="one randomly chosen step per sample, the solver's linear path to the image",
        source="Dou et al., arXiv 2505.07477",
        module="sdo_cli.gradients.sdo",
        options={
            "step_choice": ("stratified", "uniform", "first", "last", "fixed"),
            "steps_per_sample": int,
            "step": int,
        },
    ),
    "full": RuleInfo(
        summary="backpropagation through every step, checkpointed",
        source="Clark et al. 2023 (DRaFT), arXiv 2309.17400",
        module="sdo_cli.gradients.full",
    ),
}


def find_rule(name: str) -> "Rule":
    """The rule called ``name``; raises KeyError with the known names."""
    if name not in RULES:
        raise KeyError(f"unknown gradient rule {name!r}; there are {', '.join(RULES)}")
    return getattr(import_module(RULES[name].module), name.replace("-", "_"))


def option_problem(rule: str, options: dict[str, Any], calls: int) -> str | None:
    """Why these options cannot be carried out together, or None; single values are checked by type before."""
    if rule != "sdo":
        return None
    choice, k, step = options.get("step_choice", "stratified"), options.get("steps_per_sample", 1), options.get("step")
    if not 1 <= k <= calls:
        return f"steps_per_sample must be between 1 and {calls}, not {k}"
    if choice == "fixed" and (step is None or not 0 <= step < calls):
        return f"step_choice fixed needs step between 0 and {calls - 1}, not {step}"
    if choice != "fixed" and step is not None:
        return f"step is for step_choice fixed; step_choice is {choice}"
    if choice in ("first", "last", "fixed") and k != 1:
        return f"step_choice {choice} takes one step per sample, not {k}"
    return None
