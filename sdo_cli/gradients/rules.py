"""The gradient rules by name, and what each can be told. Imports no torch: recipes are checked against this."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from sdo_cli.plugins import GRADIENT_RULES, REGISTERED, installed_names, load_installed

if TYPE_CHECKING:
    from sdo_cli.gradients.plan import Rule

# what a rule is told beside its options
UPDATES = "updates"
# allowed words, or the type of the value
Option = tuple[str, ...] | type
Options = dict[str, Any]


@dataclass(frozen=True)
class RuleInfo:
    """Attributes:
    module: where the function of the rule's name lives (empty for a plug-in).
    options: keyword arguments a recipe may give: allowed words, or the type.
    problem: problem(options, calls) -> why these values cannot be carried out, or None.
    chained: live calls follow each other, so it needs one graph and takes no micro-batches.
    latents_only: has no gradient for weights.
    replays: replays(options, calls) -> live calls of one update, and those there are to choose from, for a rule that
        takes ``updates``: it shares its live calls out among several updates on one rollout. None: it cannot.
    function: a plug-in's rule.
    """

    summary: str
    source: str
    module: str = ""
    options: dict[str, Option] = field(default_factory=dict)
    problem: Callable[[Options, int], str | None] | None = None
    chained: bool = False
    latents_only: bool = False
    replays: Callable[[Options, int], tuple[int, int]] | None = None
    function: "Rule | None" = None


def _between(name: str, value: float, low: float, high: float) -> str | None:
    return None if low <= value <= high else f"{name} must be between {low} and {high}, not {value}"


def _step_problem(name: str, word: str, step: int | None, calls: int) -> str | None:
    """``step`` belongs to the word ``fixed`` of the option ``name``, and ``fixed`` needs it."""
    if word == "fixed" and (step is None or not 0 <= step < calls):
        return f"{name} fixed needs step between 0 and {calls - 1}, not {step}"
    if word != "fixed" and step is not None:
        return f"step is for {name} fixed; {name} is {word}"
    return None


def _sdo_problem(options: Options, calls: int) -> str | None:
    choice, k, step = options.get("step_choice", "stratified"), options.get("steps_per_sample", 1), options.get("step")
    single = choice in ("first", "last", "fixed")
    if text := _between("steps_per_sample", k, 1, calls):
        return text
    if text := _step_problem("step_choice", choice, step, calls):
        return text
    if single and k != 1:
        return f"step_choice {choice} takes one step per sample, not {k}"
    if single and options.get("weights") in ("unit", "root"):
        return f"weights {options['weights']} evens steps out; step_choice {choice} always takes the same one"
    return None


def _alignprop_problem(options: Options, calls: int) -> str | None:
    return _step_problem("truncation", options.get("truncation", "gaussian"), options.get("step"), calls)


def _k_problem(options: Options, calls: int) -> str | None:
    return _between("k", options.get("k", 1), 1, calls)


def _drtune_replays(options: Options, calls: int) -> tuple[int, int]:
    late = min(calls, round(calls * options.get("early_stop", 0.4)))
    return options.get("k", 3), calls - late + 1 if late else calls


RULES: dict[str, RuleInfo] = {
    "sdo": RuleInfo(
        summary="one randomly chosen step per sample, the solver's linear path to the image",
        source="Dou et al., arXiv 2505.07477",
        module="sdo_cli.gradients.sdo",
        options={
            "step_choice": (
                "stratified",
                "uniform",
                "per-batch",
                "weight-proportional",
                "late-biased",
                "first",
                "last",
                "fixed",
            ),
            "steps_per_sample": int,
            "step": int,
            "weights": ("true/p", "plain", "unit", "root"),
            "as_epsilon": bool,
        },
        problem=_sdo_problem,
        replays=lambda options, calls: (options.get("steps_per_sample", 1), calls),
    ),
    "sdo-0": RuleInfo(
        summary="no network backward at all: the linear path alone (latents)",
        source="Dou et al., arXiv 2505.07477",
        module="sdo_cli.gradients.sdo",
        latents_only=True,
    ),
    "full": RuleInfo(
        summary="backpropagation through every step, checkpointed",
        source="Clark et al. 2023 (DRaFT), arXiv 2309.17400",
        module="sdo_cli.gradients.full",
        chained=True,
    ),
    "draft-k": RuleInfo(
        summary="backpropagation through the last k steps",
        source="Clark et al. 2023, arXiv 2309.17400",
        module="sdo_cli.gradients.draft",
        options={"k": int},
        problem=_k_problem,
        chained=True,
    ),
    "draft-lv": RuleInfo(
        summary="the last step, repeated on re-noised images",
        source="Clark et al. 2023, arXiv 2309.17400",
        module="sdo_cli.gradients.draft",
        options={"repeats": int},
        problem=lambda options, calls: _between("repeats", options.get("repeats", 2), 1, 64),
    ),
    "alignprop": RuleInfo(
        summary="backpropagation through all steps after a random one",
        source="Prabhudesai et al. 2023, arXiv 2310.03739",
        module="sdo_cli.gradients.alignprop",
        options={"truncation": ("gaussian", "uniform", "fixed"), "step": int},
        problem=_alignprop_problem,
        chained=True,
    ),
    "refl": RuleInfo(
        summary="one step of the last quarter, sampling stops there, reward of its x0-prediction",
        source="Xu et al. 2023 (ImageReward), arXiv 2304.05977",
        module="sdo_cli.gradients.refl",
    ),
    "drtune": RuleInfo(
        summary="k equally spaced steps with detached inputs, early stop",
        source="Wu et al. 2024, arXiv 2405.00760",
        module="sdo_cli.gradients.drtune",
        options={"k": int, "early_stop": float},
        problem=lambda options, calls: (
            _between("k", options.get("k", 3), 1, calls) or _between("early_stop", options.get("early_stop", 0.4), 0, 1)
        ),
        replays=_drtune_replays,
    ),
    "bridge": RuleInfo(
        summary="as flowbp-sparse, and through the input of one step to those before",
        source="FlowBP-Bridge, arXiv 2606.11075",
        module="sdo_cli.gradients.bridge",
        options={"k": int, "late_bias": float, "alpha": float, "rescale": float},
        problem=lambda options, calls: (
            _between("k", options.get("k", min(5, calls)), 1, calls)
            or _between("late_bias", options.get("late_bias", 4.0), 0, 10)
            or _between("alpha", options.get("alpha", 0.5), 0, 1)
            or _between("rescale", options.get("rescale", 0.5), 0, 1)
        ),
        chained=True,
    ),
    "lagrange": RuleInfo(
        summary="two steps that stand for the others by interpolation",
        source="FlowBP-Lagrange, arXiv 2606.11075",
        module="sdo_cli.gradients.lagrange",
        options={"order": int, "alpha": float, "gap": float},
        problem=lambda options, calls: (
            _between("order", options.get("order", 3), 1, 3)
            or _between("alpha", options.get("alpha", 0.1), 0, 1)
            or _between("gap", options.get("gap", 0.2), 0, 0.5)
        ),
        chained=True,
    ),
    "leapalign": RuleInfo(
        summary="two leaps, from a random step to a later one and on to the image",
        source="Liang et al. 2026, arXiv 2604.15311",
        module="sdo_cli.gradients.leapalign",
        options={"alpha": float},
        problem=lambda options, calls: _between("alpha", options.get("alpha", 0.3), 0, 1),
        chained=True,
    ),
    "flowbp-sparse": RuleInfo(
        summary="k random steps, later ones likelier, detached inputs",
        source="FlowBP-Sparse, arXiv 2606.11075",
        module="sdo_cli.gradients.flowbp",
        options={"k": int, "late_bias": float, "rescale": float},
        problem=lambda options, calls: (
            _between("k", options.get("k", min(4, calls)), 1, calls)
            or _between("late_bias", options.get("late_bias", 1.0), 0, 10)
            or _between("rescale", options.get("rescale", 0.5), 0, 1)
        ),
        replays=lambda options, calls: (options.get("k", min(4, calls)), calls),
    ),
}


def resolve(name: str) -> bool:
    """Whether there is a rule of this name, here or in an installed package, which is then loaded."""
    return name in RULES or load_installed(GRADIENT_RULES, name, RULES)


def known_names() -> list[str]:
    return [*RULES, *(name for name in installed_names(GRADIENT_RULES) if name not in RULES)]


def find_rule(name: str) -> "Rule":
    """The rule called ``name``; raises KeyError with the known names."""
    if not resolve(name):
        raise KeyError(f"unknown gradient rule {name!r}; there are {', '.join(known_names())}")
    info = RULES[name]
    return info.function or getattr(import_module(info.module), name.replace("-", "_"))


def with_updates(options: Options, updates: int) -> Options:
    """What a rule is called with: of one update nothing is said, which every rule serves."""
    return options if updates == 1 else {**options, UPDATES: updates}


def gradient_rule(
    name: str,
    *,
    summary: str,
    source: str = "",
    problem: Callable[[Options, int], str | None] | None = None,
    chained: bool = False,
) -> Callable[["Rule"], "Rule"]:
    """Decorator that makes a function a gradient rule recipes can name (docs/plugins.md).

    Its keyword-only parameters become the rule's options, checked by their annotation: int, float, bool or
    ``Literal`` words. One called ``updates: int`` is no option: the rule then serves ``rollout.updates`` and returns
    a plan whose ``turn`` says which live call is for which update.

    Raises:
        ValueError: the name is taken, or an option has another annotation.
    """

    def register(function: "Rule") -> "Rule":
        if name in RULES:
            raise ValueError(f"there is a gradient rule {name!r} already; give yours another name")
        REGISTERED.append(name)
        RULES[name] = RuleInfo(
            summary,
            source,
            options=_options_of(name, function),
            problem=problem,
            chained=chained,
            replays=_any_replays if UPDATES in inspect.signature(function).parameters else None,
            function=function,
        )
        return function

    return register


def _options_of(name: str, function: "Rule") -> dict[str, Option]:
    hints, options = get_type_hints(function), dict[str, Option]()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name == UPDATES:
            continue
        hint = hints.get(parameter.name)
        words = get_args(hint) if get_origin(hint) is Literal else None
        if words is None and hint not in (int, float, bool):
            raise ValueError(f"option {parameter.name} of rule {name!r} must be int, float, bool or Literal[…] words")
        options[parameter.name] = words or cast(type, hint)
    return options


def _any_replays(options: Options, calls: int) -> tuple[int, int]:
    """Of a plug-in's rule nothing is known beforehand."""
    return 1, calls


def option_problem(rule: str, options: Options, calls: int) -> str | None:
    """Why these options cannot be carried out together, or None; single values are checked by type before."""
    problem, foreign = RULES[rule].problem, RULES[rule].function is not None
    try:
        return problem(options, calls) if problem else None
    except Exception as fault:
        if not foreign:
            raise
        return f"the plug-in's own check failed: {type(fault).__name__}: {fault}"
