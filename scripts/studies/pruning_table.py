"""Every way to draw with less, at equal budgets, on 256 held-out prompts (about an hour on one core).

    sdo prune -p emoji-train.txt --guidance 5 --updates 300 --ratio 0.8 --num-prompts 0 --out work/shortcut
    sdo prune -p emoji-train.txt --guidance 5 --updates 100 --gradients full --ratio 0.8 --num-prompts 0 --out work/full
    python scripts/studies/pruning_table.py measure --scores work/shortcut --scores work/full --out work/pruning-table
    python scripts/studies/pruning_table.py search --out work/pruning-search
    python scripts/studies/pruning_table.py macs

``measure``: learned plans, baselines, shorter and chosen schedules; the judge's score against the full sampler's.
``search``: seconds, FLOPs and memory of one update of the gates, by kind of gradient, all in turn in every round.
``macs``: multiply-adds of known models as papers count them, and everything there is.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from sdo_cli.bench.memory import peak_of_tensors
from sdo_cli.cli.output import make_reporter
from sdo_cli.device import dtype_of
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.estimate.flops import count_flops
from sdo_cli.estimate.units import decode_flops, unit_flops
from sdo_cli.files import write_json
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.prune.measure import Arm, measure
from sdo_cli.prune.methods import controls, from_scores
from sdo_cli.prune.scores import load_scores
from sdo_cli.prune.search import SearchSettings, search
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.tables import record, save_figures, table
from sdo_cli.recipe.prompts import read_prompts
from sdo_cli.recipe.schema import PromptSource
from sdo_cli.scoring.rewards import build_reward

RATIOS, LEARNED_RATIOS = [0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.8, 0.9]
KINDS = {
    "full": SearchSettings("attention", "full"),
    "shortcut, 1 call": SearchSettings("attention", "shortcut", live_calls=1),
    "shortcut, 4 calls": SearchSettings("attention", "shortcut", live_calls=4),
    "one-step, 4 calls": SearchSettings("attention", "one-step", live_calls=4),
}
# updates until gates close
WARM = 12
PUBLISHED = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3-medium-diffusers",
    "embedded",
)


def opened(grain: str = "blocks") -> Setting:
    source = ModelSource("embedded")
    family = load_family(source, dtype=dtype_of("no"))
    family.to(torch.device("cpu"), dtype_of("no"))
    prompts = read_prompts(PromptSource(file="emoji-train.txt"), None)
    settings = DrawSettings(num_inference_steps=50, guidance_scale=5.0)
    return Setting(family, source, PromptEmbeddings(family), settings, prompts, grain)


def measured(folders: list[Path], prompts: int, out: Path) -> None:
    setting = opened()
    arms = list[Arm]()
    for folder in folders:
        scores, made_by = load_scores(folder, setting)
        for ratio in LEARNED_RATIOS if folder == folders[0] else RATIOS:
            plan = from_scores(setting, ratio, scores, **made_by)
            arms.append(Arm(f"dip-go, {folder.name} {ratio:g}", setting.settings, plan, ratio))
    arms += controls(setting, RATIOS)
    held_out = read_prompts(PromptSource(file="emoji-heldout.txt"), None)[:prompts]
    rewards = {name: build_reward(name, options, torch.device("cpu")) for name, options in MEASURES.items()}
    out.mkdir(parents=True, exist_ok=True)
    found, reporter = [], make_reporter(as_json=False, quiet=False)
    for item in measure(setting, arms, held_out, rewards, reporter=reporter, batch_size=16, rounds=2):
        found.append(item)
        tree = record(found, setting.flops)
        tree["values"] = {each.arm.name: {k: v.tolist() for k, v in each.values.items()} for each in found}
        write_json(out / "measures.json", tree)
        save_figures(found, out)
    print(table(found))


MEASURES: dict[str, dict[str, str]] = {"judge": {}, "clip-embedded": {}}


def searched(rounds: int, out: Path) -> None:
    """Of updates after WARM others, when most gates are closed: pruned walks are cheap then."""
    setting = opened()
    running = {name: search(setting, replace(kind, updates=WARM + rounds + 2)) for name, kind in KINDS.items()}
    kept = {name: list(islice(updates, WARM))[-1].kept for name, updates in running.items()}
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(rounds):
        for name, updates in running.items():
            start = time.perf_counter()
            next(updates)
            seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, updates in running.items():
        flops = count_flops(partial(next, updates))
        peak = peak_of_tensors(lambda updates=updates: next(updates))
        over = [a / b for a, b in zip(seconds[name], seconds["full"], strict=True)]
        rows[name] = {
            "kept": kept[name],
            "over_full": over,
            "median_over_full": median(over),
            "gflops": flops / 1e9,
            "peak_of_tensors_mb": peak / 1e6,
        }
        print(name, {k: v for k, v in rows[name].items() if k != "over_full"}, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "search.json", rows)


def macs() -> None:
    for name in PUBLISHED:
        source = ModelSource(name)
        costs = unit_flops(source, "blocks")
        print(
            f"{name:50} {costs.call.published_macs / 1e9:8.1f} G multiply-adds a branch and step without attention's "
            f"products; {costs.call.all / 1e9:8.1f} GFLOP with them; decoder {decode_flops(source) / 1e9:7.1f} GFLOP"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "search", "macs"])
    parser.add_argument("--scores", type=Path, action="append", default=[])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "macs":
        macs()
    elif given.what == "search":
        searched(given.rounds, given.out)
    else:
        measured(given.scores, given.prompts, given.out)


if __name__ == "__main__":
    main()
