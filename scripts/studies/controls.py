"""Is the gain the gradient's? The same short run three times: as it is, with g's sign flipped, with g permuted.

    python scripts/studies/controls.py --out work/controls.json max_train_steps=60

All three start from the same adapter and draw the same noise, prompts and steps. Held-out prompts only measure.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.cli.output import make_reporter
from sdo_cli.recipe.load import load_recipe
from sdo_cli.scoring.statistics import Gain, paired_gain
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare

Change = Callable[[Tensor, int], Tensor] | None


def permuted(g: Tensor, step: int) -> Tensor:
    """Each sample gets another sample's gradient: a random cycle through the batch, so none keeps its own."""
    order = torch.randperm(len(g), generator=keyed_generator(0, "control-permutation", step))
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return g[source.to(g.device)]


VARIANTS: dict[str, Change] = {"sdo": None, "sign flipped": lambda g, step: -g, "permuted": permuted}


def run_controls(recipe: str, overrides: list[str], names: list[str] | None = None) -> dict[str, dict[str, Gain]]:
    """Gain on the held-out prompts by variant and reward."""
    gains: dict[str, dict[str, Gain]] = {}
    before = None
    for name in names or list(VARIANTS):
        job, validation = prepare(load_recipe(recipe, overrides))
        assert validation is not None
        reporter = make_reporter(as_json=False, quiet=False)
        pairs = len(validation.prompts) * validation.seeds
        if before is None:
            reporter.phase("before", pairs)
            before = validation.measure(job.family, reporter)
        reporter.phase(name, job.recipe.max_train_steps)
        for result in train(job, change_g=VARIANTS[name]):
            reporter.advance(1, f"loss {result.loss:.4f}")
        reporter.phase(f"{name}, after", pairs)
        after = validation.measure(job.family, reporter)
        gains[name] = {reward: paired_gain(before[reward], after[reward]) for reward in before}
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = {}
    for name, rewards in run_controls(options.recipe, options.overrides).items():
        for reward, gain in rewards.items():
            print(f"{name:<14} {reward:<12} {gain.difference} ({gain.in_standard_errors:+.1f} standard errors)")
            table[f"{name} / {reward}"] = {
                "difference": gain.difference.mean,
                "standard_error": gain.difference.standard_error,
                "prompts": gain.difference.n,
            }
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
