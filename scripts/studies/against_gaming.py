"""What each defence against gaming leaves of the prompt at an equal gain of the trained reward, on `guarded`.

    OMP_NUM_THREADS=1 python scripts/studies/against_gaming.py run OUT --arms plain,views --seeds 0
    python scripts/studies/against_gaming.py table OUT --gain 1.5

Each arm trains with a checkpoint every few steps; `sdo eval --lora RUN@all` scores prompts nothing was trained on by
the trained reward, by the judge, which no arm is trained on, and by clip-embedded. The table has both where the reward
first has the gain, between two checkpoints in proportion. Nothing is chosen by the judge: the arms' numbers were set
before any was run.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

TO_THE_END = [
    "combine={normalise: spread}",
    "lora={rank: 16, layers: all}",
    "learning_rate=4e-4",
    "lr_scheduler=cosine",
    "rollout={num_inference_steps: 10, updates: 4, max_change: 0.01}",
]
LARGE = [*TO_THE_END[2:], "lora={rank: 64, layers: all}", "train_batch_size=16"]
ARMS = {
    "plain": [],
    "views": ["sight={crop: 0.3, noise: 0.05, jpeg: 40}"],
    "bound": ["sight={views: 4, crop: 0.3, noise: 0.05, jpeg: 40, lower_bound: 2.0}"],
    "sharp": ["sight={sharpness: 0.1}"],
    "kl": ["kl_weight=1.0"],
    "kl-30": ["kl_weight=30.0"],
    # held only where copies of a picture disagree: more of them than their mean at the start of training
    "kl-30-gate": ["kl_weight=30.0", "kl_gate=0.16", "sight={views: 4, crop: 0.3, noise: 0.05, jpeg: 40}"],
    "weights-sharp": ["gradient.weight_sharpness=0.05"],
    "clip-2": ["rewards=[{name: aesthetic, weight: 2}, {name: clip}]", "combine={normalise: spread, measure: true}"],
    "clip-2-all": [
        "rewards=[{name: aesthetic, weight: 2}, {name: clip}]",
        "combine={normalise: spread, measure: true}",
        "lora={rank: 16, layers: all}",
        "learning_rate=4e-4",
    ],
    "clip-2-projection": [
        "rewards=[{name: aesthetic, weight: 2}, {name: clip}]",
        "combine={normalise: spread, conflict: projection}",
    ],
    # followed no further than 1.7 above the base's mean, by each picture for itself
    **{
        f"hinge-{weight}-all": [
            f"rewards=[{{name: aesthetic, weight: {weight}, loss: hinge, target: 5.8}}, {{name: clip}}]",
            "combine={normalise: spread, measure: true}",
            "lora={rank: 16, layers: all}",
            "learning_rate=4e-4",
        ]
        for weight in (4, 8)
    },
    # the same, trained to the end: ten-call rollouts, four updates on each, the rate falls to zero
    **{
        f"floor-{target}": [
            f"rewards=[{{name: aesthetic, weight: 4, loss: hinge, target: {target}}}, {{name: clip}}]",
            *TO_THE_END,
        ]
        for target in (4.8, 5.0, 5.2, 5.6)
    },
    # between them and two to one, which has no need of a floor
    **{
        f"floor-{target}-3": [
            f"rewards=[{{name: aesthetic, weight: 3, loss: hinge, target: {target}}}, {{name: clip}}]",
            *TO_THE_END,
        ]
        for target in (5.2, 5.5)
    },
    # and their controls: nothing else is different, but the reward is followed as far as it goes
    **{
        f"end-{weight}": [f"rewards=[{{name: aesthetic, weight: {weight}}}, {{name: clip}}]", *TO_THE_END]
        for weight in (2, 3, 4)
    },
    # the same, without a floor and with one, in the proportion there is at the start: while prompts are lost clip's
    # spread grows threefold, so a running one lets go of it
    **{
        f"start-{weight}{name}": [
            f"rewards=[{{name: aesthetic, weight: {weight}{floor}}}, {{name: clip}}]",
            "combine={normalise: spread-at-start}",
            *TO_THE_END[1:],
        ]
        for weight in (3, 4)
        for name, floor in {"": "", "-floor-5.7": ", loss: hinge, target: 5.7"}.items()
    },
    # nearly the same, by hand: 22.5 is how many times clip's spread is in that of aesthetics before training
    **{
        f"fixed-{ratio}{name}": [
            f"rewards=[{{name: aesthetic{floor}}}, {{name: clip, weight: {22.5 / ratio:.3g}}}]",
            "combine={}",
            *TO_THE_END[1:],
        ]
        for ratio in (3, 4, 8)
        for name, floor in {"": "", "-floor-5.5": ", loss: hinge, target: 5.5"}.items()
    },
    # four times the adapter, twice the batch
    "fixed-3-large": ["rewards=[{name: aesthetic}, {name: clip, weight: 7.5}]", "combine={}", *LARGE],
    "fixed-2.5-floor-5.7-large": [
        "rewards=[{name: aesthetic, loss: hinge, target: 5.7}, {name: clip, weight: 9}]",
        "combine={}",
        *LARGE,
    ],
    # and by the option itself; of 1280 steps
    "start-2.5-floor-5.8-large": [
        "rewards=[{name: aesthetic, weight: 2.5, loss: hinge, target: 5.8}, {name: clip}]",
        "combine={normalise: spread-at-start}",
        *LARGE,
    ],
    # the other way round: aesthetics as far as they go where the prompt is kept, and the prompt alone where it is not
    **{
        f"keep-{target}": [
            f"rewards=[{{name: aesthetic}}, {{name: clip, weight: 8, loss: hinge, target: {target}}}]",
            *TO_THE_END,
        ]
        for target in (0.9, 0.94)
    },
    "clip-8": ["rewards=[{name: aesthetic, weight: 8}, {name: clip}]", "combine={normalise: spread, measure: true}"],
    "clip-4": ["rewards=[{name: aesthetic, weight: 4}, {name: clip}]", "combine={normalise: spread, measure: true}"],
    "clip": ["rewards=[aesthetic,clip]", "combine={normalise: spread, measure: true}"],
    "clip-projection": ["rewards=[aesthetic,clip]", "combine={normalise: spread, conflict: projection}"],
    "clip-mgda": ["rewards=[aesthetic,clip]", "combine={normalise: spread, conflict: mgda}"],
}
TRAINED, MEASURES = "aesthetic-embedded", ("judge", "clip-embedded")


def sdo(*words):
    subprocess.run([sys.executable, "-m", "sdo_cli", *map(str, words)], check=True)


def run(out, arms, seeds, steps, every, prompts):
    for seed in seeds:
        for arm in arms:
            folder = out / f"{arm}-{seed}"
            if not (folder / "README.md").exists():
                words = ["guard={}", "validation.prompts={}", "validation.rewards=[]", f"seed={seed}"]
                # a quarter of the recipe's rollouts: this is about where a reward leads, not how fast
                words += ["rollout.num_inference_steps=5"]
                words += [f"max_train_steps={steps}", f"checkpointing_steps={every}", "checkpoints_total_limit=1"]
                sdo("finetune", "--recipe", "guarded", "-q", "--out", folder, *words, *ARMS[arm])
            measured = ["--rewards", f"{TRAINED},{','.join(MEASURES)}", "--no-embedding", "--no-report", "-q"]
            drawn = ["--prompts", "emoji-eval", "--limit", prompts, "--steps", 10, "--lora", f"{folder}@all"]
            sdo("eval", *drawn, *measured, "--out", out / f"{arm}-{seed}-eval")


def curve(folder):
    """By step: means of every measure, less the base's."""
    tree = json.loads((folder / "summary.json").read_text())
    rows = {}
    for entry in tree["variants"].values():
        step = int((entry["lora"] or "@0").rpartition("@")[2])
        rows[step] = {measure: entry["measures"][measure]["mean"] for measure in (TRAINED, *MEASURES)}
    base = rows[0]
    return {step: {m: rows[step][m] - base[m] for m in base} for step in sorted(rows)}, base


def at_gain(points, gain):
    """Step and measures where the trained reward first has the gain; None where it never does."""
    steps = list(points)
    for before, after in pairwise(steps):
        a, b = points[before], points[after]
        if b[TRAINED] >= gain:
            share = (gain - a[TRAINED]) / (b[TRAINED] - a[TRAINED])
            return before + share * (after - before), {m: a[m] + share * (b[m] - a[m]) for m in MEASURES}
    return None


def of_seeds(values):
    """Their mean, with its error where there are several."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{error}"


def means(out, gain):
    """One row an arm: where the gain is first there, and at the last step."""
    arms = {}
    for folder in sorted(out.glob("*-eval")):
        if (folder / "summary.json").exists():
            arms.setdefault(folder.name.removesuffix("-eval").rpartition("-")[0], []).append(curve(folder)[0])
    print(f"| arm | seeds | judge at {gain:+g} | last step | {TRAINED} | judge | clip-embedded |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for arm, seeds in arms.items():
        found, last = [at_gain(points, gain) for points in seeds], [points[max(points)] for points in seeds]
        there = of_seeds([at[1]["judge"] if at else None for at in found])
        ends = " | ".join(of_seeds([points[m] for points in last]) for m in (TRAINED, *MEASURES))
        print(f"| {arm} | {len(seeds)} | {there} | {max(seeds[0])} | {ends} |")


def table(out, gain):
    print(f"| arm, seed | steps to {TRAINED} {gain:+g} | judge | clip-embedded | last step: {TRAINED} | judge |")
    print("|---|--:|--:|--:|--:|--:|")
    for folder in sorted(out.glob("*-eval")):
        if not (folder / "summary.json").exists():
            continue
        points, base = curve(folder)
        found, last = at_gain(points, gain), points[max(points)]
        there = (
            f"{found[0]:.0f} | {found[1]['judge']:+.3f} | {found[1]['clip-embedded']:+.3f}" if found else "– | – | –"
        )
        end = f"{last[TRAINED]:+.2f} at {max(points)} | {last['judge']:+.3f}"
        print(f"| {folder.name.removesuffix('-eval')} | {there} | {end} |")
    print()
    means(out, gain)
    print(f"\nbefore training: judge {base['judge']:.3f}, {TRAINED} {base[TRAINED]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--gain", type=float, default=1.5)
    options = parser.parse_args()
    if options.what == "table":
        table(options.out, options.gain)
    else:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        run(options.out, options.arms.split(","), seeds, options.steps, options.every, options.prompts)


if __name__ == "__main__":
    main()
