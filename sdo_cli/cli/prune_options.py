"""Options of `sdo prune`, checked before torch loads."""

from typing import TYPE_CHECKING

import rewards as table
from sdo_cli.embedded import is_embedded
from sdo_cli.recipe.check import check_reward
from sdo_cli.recipe.prompts import read_prompts
from sdo_cli.recipe.schema import PromptSource, RewardSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

METHODS = ("dip-go", "uniform", "deepcache", "random", "optimal-steps", "pairwise-steps")
GRAINS = ("blocks", "parts")
PRUNERS = ("attention", "table")
GRADIENTS = ("shortcut", "full", "one-step")
DISTANCES = ("ssim", "l1", "l2")
# one search serves them all
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
# rate and optimizer: the paper's for its network; a bare table has no weights to share and needs larger steps
RATES = {"attention": (0.1, "sgd"), "table": (0.05, "adam")}
# at the sparsest, every so many of --prompts is kept for measuring
KEPT_FOR_MEASURING = 10


def problems(
    *,
    method: str,
    ratios: list[float],
    grain: str,
    pruner: str,
    gradients: str,
    distance: str,
    numbers: "Mapping[str, int]",
    num_prompts: int,
    learning_rate: float | None,
    sparsity: float,
    steps: int,
) -> list[str]:
    """Everything that is wrong with them."""
    choices = [
        ("method", method, METHODS),
        ("grain", grain, GRAINS),
        ("pruner", pruner, PRUNERS),
        ("gradients", gradients, GRADIENTS),
        ("distance", distance, DISTANCES),
    ]
    wrong = [f"--{name}: {given!r} is not one of {', '.join(of)}" for name, given, of in choices if given not in of]
    wrong += [f"--ratio: must be at least 0 and below 1, not {r:g}" for r in ratios if not 0 <= r < 1]
    wrong += [f"--ratio: {r:g} has more than two decimals" for r in ratios if 0 <= r < 1 and round(r, 2) != r]
    wrong += [f"--{name}: must be at least 1, not {number}" for name, number in numbers.items() if number < 1]
    if numbers["live-calls"] >= max(2, steps):
        wrong.append(f"--live-calls: {numbers['live-calls']} of {steps} steps; the first is always whole, so fewer")
    if num_prompts < 0 or num_prompts == 1:
        wrong.append(f"--num-prompts: an interval needs 2 or more, and 0 measures nothing; not {num_prompts}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        wrong.append(f"--lr: must be above 0, not {learning_rate}")
    if not 0 <= sparsity < float("inf"):
        wrong.append(f"--sparsity: must be 0 or more, not {sparsity}")
    if steps < 2:
        wrong.append(f"--steps: there is nothing to skip in {steps}; 2 or more")
    return wrong


def reward_specs(names: list[str], model: str, wrong: list[str]) -> list[RewardSpec]:
    """Rewards to measure with; an embedded model goes with embedded ones."""
    specs = []
    for name in dict.fromkeys(names):
        spec = RewardSpec(name)
        check_reward(spec, (), lambda key, text: wrong.append(f"--reward: {text}"))
        if table.resolve(name):
            options = table.with_embedded(name, {}) if is_embedded(model) else {}
            specs.append(RewardSpec(table.full_name(name), options=options))
    return specs


def search_prompts(name: str | None, wrong: list[str]) -> list[str]:
    if name is None:
        wrong.append(
            "--prompts: is missing; name a file of prompts, one a line, or a shipped list (`sdo prompts list`)"
        )
        return []
    return _read(name, "prompts", wrong)


def _read(name: str, option: str, wrong: list[str]) -> list[str]:
    try:
        return list(dict.fromkeys(read_prompts(PromptSource(file=name), None)))
    except ValueError as fault:
        wrong.append(f"--{option}: {fault}")
        return []


def measured_prompts(
    prompts: list[str], measure_on: str | None, most: int, wrong: list[str]
) -> tuple[list[str], list[str]]:
    """Prompts to measure on, and those left to search with: never the same."""
    if most == 0:
        return [], prompts
    if measure_on is None:
        # spread over the list, and never more than half of it
        held = prompts[:: max(2, min(KEPT_FOR_MEASURING, len(prompts) // most))][:most]
    else:
        held = _read(measure_on, "measure-on", wrong)[:most]
    left = [prompt for prompt in prompts if prompt not in set(held)]
    if prompts and not wrong and (len(held) < 2 or not left):
        wrong.append(
            f"--prompts: {len(prompts)} are too few to search on some and measure on two others; "
            "add some, or --num-prompts 0"
        )
    return held, left
