"""What an arm has learned after so many CPU seconds of training; one thread, evaluation not counted.

python scripts/studies/reward_per_second.py OUT NAME SEED BUDGETS PROMPTS [recipe overrides …]

BUDGETS are CPU seconds, 60,120,200 say, or optimizer steps: 40n. The learning rate is constant; with overrides
max_train_steps, lr_scheduler, … training ends by itself, and a budget beyond that is its end. PROMPTS is `dev` (64
prompts taken out of the training prompts, two pictures each: what is chosen is chosen by them) or `held-out` (the
quickstart's 256). OUT/NAME-sSEED.jsonl gets a line per budget; a LoRA is kept beside it. `table OUT` prints all of
them, seeds put together.
"""

import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from sdo_cli.progress import Silent
from sdo_cli.recipe.load import load_recipe
from sdo_cli.scoring.statistics import paired_gain
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare

DEV = [
    "prompts.file=emoji-train-guarded.txt",
    "validation.prompts.file=emoji-guard.txt",
    "validation.num_prompts=64",
    "validation.seeds=2",
]
HELD_OUT = ["prompts.file=emoji-train-guarded.txt"]


def used() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def learn(out: Path, name: str, seed: int, budgets: list[str], prompts: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    fixed = [f"seed={seed}", "lr_scheduler=constant", "lr_warmup_steps=0", "max_train_steps=100000"]
    loaded = load_recipe("quickstart", [*fixed, *(DEV if prompts == "dev" else HELD_OUT), *overrides])
    job, validation = prepare(loaded)
    assert validation is not None
    out.mkdir(parents=True, exist_ok=True)
    before_at = out / f"before-{prompts}-s{seed}-{job.recipe.num_inference_steps}-{job.recipe.guidance_scale:g}.pt"
    if not before_at.is_file():
        torch.save(validation.measure(job.family, Silent()), before_at)
    before = torch.load(before_at, weights_only=True)
    spent, wall, steps, rollouts, results, recent = 0.0, 0.0, 0, 0, train(job), []
    with (out / f"{name}-s{seed}.jsonl").open("w") as log:
        for budget in budgets:
            most = float(budget.removesuffix("n"))
            while (steps if budget.endswith("n") else spent) < most and steps < job.recipe.max_train_steps:
                cpu, start = used(), time.perf_counter()
                result = next(results)
                spent, wall, steps = spent + used() - cpu, wall + time.perf_counter() - start, steps + 1
                rollouts += result.replay is None or result.replay.update == 1
                recent = [*recent[-39:], result]
            if steps == job.recipe.max_train_steps:
                # puts the weights to keep in place
                next(results, None)
            after = validation.measure(job.family, Silent())
            gains = {reward: paired_gain(before[reward], after[reward]).difference for reward in before}
            replays = [found.replay for found in recent if found.replay and found.replay.update > 1]
            cosines = [found.cosine for found in replays if found.cosine is not None]
            line = {
                "name": name,
                "seed": seed,
                "budget": budget,
                "cpu": round(spent, 2),
                "wall": round(wall, 2),
                "steps": steps,
                "rollouts": rollouts,
                "trained": round(statistics.fmean(-found.loss for found in recent), 5),
                "change": round(statistics.fmean(found.change for found in replays), 4) if replays else None,
                "cosine": round(statistics.fmean(cosines), 3) if cosines else None,
                "gain": {
                    reward: [round(gain.mean, 5), round(gain.standard_error, 5)] for reward, gain in gains.items()
                },
            }
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)
            if job.recipe.train == "lora":
                job.family.save_lora(out / f"{name}-s{seed}-{budget}")


def table(out: Path) -> None:
    rows: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for path in sorted(out.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            rows[line["name"], str(line["budget"])].append(line)
    for (name, budget), lines in sorted(rows.items()):
        found = []
        for reward in lines[0]["gain"]:
            means = [line["gain"][reward][0] for line in lines]
            spread = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else lines[0]["gain"][reward][1]
            found.append(f"{reward} {statistics.fmean(means):+.4f} ± {spread:.4f}")
        steps, cpu = (statistics.fmean(line[key] for line in lines) for key in ("steps", "cpu"))
        more = [f"{key} {lines[-1][key]}" for key in ("change", "cosine") if lines[-1].get(key) is not None]
        print(
            f"{name:40} {budget:>5}  CPU s {cpu:6.1f}  seeds {len(lines)}  steps {steps:6.0f}  "
            + "  ".join([*found, *more])
        )


if __name__ == "__main__":
    if sys.argv[1] == "table":
        table(Path(sys.argv[2]))
    else:
        learn(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4].split(","), sys.argv[5], sys.argv[6:])
