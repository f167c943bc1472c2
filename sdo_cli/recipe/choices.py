"""What may be chosen for a key, with a line on each, read off the tables of rules, rewards and solvers; no torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import rewards as reward_table
from sdo_cli.gradients.rules import RULES, RuleInfo
from sdo_cli.recipe.check import TRACKERS
from sdo_cli.recipe.rule_choice import AUTO as RULE_AUTO
from sdo_cli.recipe.signatures import NO_DEFAULT, Signature, signature_in, signature_of, word_in
from sdo_cli.recipe.steering_meanings import KIND_OPTION_MEANINGS
from sdo_cli.recipe.steering_schema import KIND_OPTIONS, LOOK_ELSEWHERE, VARIABLES
from sdo_cli.recipe.typed import SCALARS
from sdo_cli.sampling.solvers import SOLVERS, Solver

TYPES = {kind: words for kind, (_, words) in SCALARS.items()} | {list: "a list"}


@dataclass(frozen=True)
class Option:
    """Attributes:
    type: in words, or the allowed ones.
    default: as a recipe would say it; None where one has to be given.
    """

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Choice:
    """Attributes:
    text: a line on it.
    options: what can be told to it, where the key is about that.
    """

    name: str
    text: str = ""
    options: tuple[Option, ...] = ()


def as_yaml(value: Any) -> str:
    """A default as it would be written."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if 0 < abs(value) < 1e-3 else str(value)
    if isinstance(value, list | dict):
        return f"[{', '.join(map(as_yaml, value))}]" if value else "none"
    return str(value) or "empty"


def rules_of_training() -> tuple[Choice, ...]:
    return (Choice(RULE_AUTO, "full where that costs about as much as sdo, at one or two calls; else sdo"), *rules())


def rules(*, but: Iterable[str] = (), for_weights: bool = True) -> tuple[Choice, ...]:
    named = {name: info for name, info in RULES.items() if name not in but}
    return tuple(
        Choice(name, f"{info.summary} ({info.source})" if info.source else info.summary)
        for name, info in named.items()
        if not (for_weights and info.latents_only)
    )


def rule_options() -> tuple[Choice, ...]:
    return tuple(Choice(name, "", _options_of_rule(name, info)) for name, info in RULES.items() if info.options)


def _options_of_rule(name: str, info: RuleInfo) -> tuple[Option, ...]:
    told = signature_of(info.function) if info.function else signature_in(info.module, name.replace("-", "_"))
    kinds = {n: ", ".join(k) if isinstance(k, tuple) else TYPES[k] for n, k in info.options.items()}
    return _options(kinds, told)


def _options(kinds: dict[str, str], told: Signature) -> tuple[Option, ...]:
    defaults = {name: None if (value := told.defaults[name]) is NO_DEFAULT else as_yaml(value) for name in kinds}
    return tuple(Option(name, kinds[name], defaults[name], told.meanings.get(name, "")) for name in kinds)


def rewards() -> tuple[Choice, ...]:
    short = {full: name for name, full in reward_table.SHORT.items()}
    found = []
    for name in (*reward_table.TABLE, *reward_table.FOREIGN):
        foreign = reward_table.FOREIGN.get(name)
        text = foreign.summary if foreign else word_in(reward_table.TABLE[name], "INFO", "summary")
        only = "; only measures" if reward_table.is_measure_only(name) else ""
        found.append(Choice(name, (f"or {short[name]}; " if name in short else "") + text + only))
    return tuple(found)


def reward_options() -> tuple[Choice, ...]:
    return tuple(Choice(name, "", _options_of_reward(name)) for name, given in reward_table.OPTIONS.items() if given)


def _options_of_reward(name: str) -> tuple[Option, ...]:
    foreign = reward_table.FOREIGN.get(name)
    told = signature_of(foreign.make) if foreign else signature_in(reward_table.TABLE[name], "build")
    given = sorted(reward_table.OPTIONS[name])
    return _options({option: TYPES[reward_table.TYPES.get((name, option), str)] for option in given}, told)


def solvers() -> tuple[Choice, ...]:
    kinds = {True: "flow matching: SD 3, 3.5", False: "noise or v: SD 1.x, 2.x, XL"}
    auto = Choice("auto", "the sampler that the model's own folder names")

    def about(solver: Solver) -> str:
        whose = "diffusers'" if solver.module == "diffusers" else "sdo's own"
        return f"{kinds[solver.flow]}; {whose} {solver.scheduler}{'; adds fresh noise' if solver.noisy else ''}"

    return (auto, *(Choice(name, about(solver)) for name, solver in SOLVERS.items()))


def objective_options() -> tuple[Choice, ...]:
    def option(kind: str, name: str, hint: type) -> Option:
        meaning = KIND_OPTION_MEANINGS.get(f"{kind}.{name}") or KIND_OPTION_MEANINGS[name]
        return Option(name, "a number, or two" if hint is list else TYPES[hint], "not given", meaning)

    return tuple(
        Choice(f"{kind}:…", "", tuple(option(kind, name, hint) for name, hint in given.items()))
        for kind, given in KIND_OPTIONS.items()
        if given
    )


def words(names: Iterable[str]) -> tuple[Choice, ...]:
    return tuple(map(Choice, names))


# by verb and key
CHOICES: dict[tuple[str, str], Callable[[], tuple[Choice, ...]]] = {
    ("finetune", "gradient.rule"): rules_of_training,
    ("finetune", "gradient.options"): rule_options,
    ("finetune", "rewards.0.name"): rewards,
    ("finetune", "rewards.0.options"): reward_options,
    ("finetune", "solver"): solvers,
    ("finetune", "trackers"): lambda: words(TRACKERS),
    ("optimize", "rule"): lambda: rules(but=LOOK_ELSEWHERE, for_weights=False),
    ("optimize", "solver"): solvers,
    ("optimize", "variables"): lambda: words(VARIABLES),
    ("optimize", "objectives.0.options"): objective_options,
}
