"""Training with cheaper rollouts: seconds per iteration side by side, and what is gained in them.

    python scripts/studies/pruned_training.py cost --plan plan-0.80.json --out work/pruned-cost.json
    python scripts/studies/pruned_training.py gain --plan plan-0.80.json --out work/pruned-gain.json  (about 90 minutes)

Arms: plain SDO; rollouts under the plan with exact gradients, and with the whole network run again; a plain schedule
of as many steps as the plan computes calls. ``gain`` trains the cheap ones on until they took as long as plain SDO, by
the seconds measured side by side at its start, and measures all at equal iterations too. Rewards are measured on
held-out prompts with the full sampler.
"""

import argparse
import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sdo_cli.progress import Silent
from sdo_cli.recipe.load import load_recipe
from sdo_cli.records.step import StepResult
from sdo_cli.scoring.statistics import paired_gain
from sdo_cli.skipping.skip_plan import load_plan
from sdo_cli.training.job import Job
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare
from sdo_cli.training.validate import Validation

STEPS = 50


def arms(plan: Path) -> dict[str, list[str]]:
    """Recipe overrides by name."""
    calls = sum(not repeated for repeated in load_plan(plan).repeats)
    skipping = [f"rollout.skip_plan={plan.resolve()}"]
    return {
        "plain": [],
        "plan, exact": skipping,
        "plan, whole": [*skipping, "rollout.estimator=whole"],
        f"ddim-{calls}": [f"rollout.num_inference_steps={calls}"],
    }


def opened(overrides: list[str], seed: int, steps: int, prompts: int) -> tuple[Job, Validation]:
    common = [f"num_inference_steps={STEPS}", f"seed={seed}", f"max_train_steps={steps}", "lr_scheduler=constant"]
    loaded = load_recipe("quickstart", [*common, f"validation.num_prompts={prompts}", *overrides])
    job, validation = prepare(loaded)
    assert validation is not None
    return job, validation


def cost(plan: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one iteration per arm and round, all arms in turn in every round; the first is not counted."""
    every = arms(plan) | {"full": ["gradient.rule=full"]}
    running = {name: train(opened(overrides, 0, rounds + 1, 2)[0]) for name, overrides in every.items()}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for number in range(rounds + 1):
        for name, steps in running.items():
            start = time.perf_counter()
            next(steps)
            if number:
                seconds[name].append(time.perf_counter() - start)
        print(number, {name: round(found[-1], 2) for name, found in seconds.items() if found}, flush=True)
    over = {name: [a / b for a, b in zip(found, seconds["plain"], strict=True)] for name, found in seconds.items()}
    return {"seconds": seconds, "over_plain": over}


def gain(plan: Path, iterations: int, seeds: int, prompts: int, only: list[str] | None, out: Path) -> dict[str, object]:
    timing = cost(plan, 3)
    base = Scores(opened([], 0, 1, prompts))
    found: dict[str, object] = {"timing": timing, "before": base.mean, "runs": []}
    before = base.scores
    for seed in range(seeds):
        for name, overrides in arms(plan).items():
            if only and name not in only:
                continue
            factor = 1 / median(timing["over_plain"][name])
            longer = 1 if name == "plan, whole" else max(1, round(iterations * factor) / iterations)
            steps = round(iterations * longer)
            job, validation = opened(overrides, seed, steps, prompts)
            running, start, spent = train(job), time.perf_counter(), 0.0
            for until in dict.fromkeys((iterations, steps)):
                start = time.perf_counter()
                results: list[StepResult] = list(islice(running, until - (0 if until == iterations else iterations)))
                spent += time.perf_counter() - start
                after = validation.measure(job.family, Silent())
                row = {"arm": name, "seed": seed, "iterations": until, "seconds": spent, "loss": results[-1].loss}
                row |= {"scores": {key: value.flatten().tolist() for key, value in after.items()}}
                row |= {key: asdict(paired_gain(before[key], value).difference) for key, value in after.items()}
                found["runs"].append(row)  # type: ignore[attr-defined]
                out.write_text(json.dumps(found) + "\n")
                gains = {key: str(paired_gain(before[key], value).difference) for key, value in after.items()}
                print(seed, name, until, f"{spent:.0f} s", gains, flush=True)
    return found


class Scores:
    """Of the untrained model, by reward."""

    def __init__(self, opened: tuple[Job, Validation]) -> None:
        job, validation = opened
        self.scores: dict[str, Tensor] = validation.measure(job.family, Silent())
        self.mean = {name: float(values.mean()) for name, values in self.scores.items()}


def summary(found: dict[str, list[dict[str, object]]]) -> str:
    """Judge and trained reward by arm and iterations: the mean over prompts of the mean over seeds, with its error."""
    rows: dict[tuple[str, int], list[dict[str, object]]] = {}
    for run in found["runs"]:
        rows.setdefault((str(run["arm"]), int(str(run["iterations"]))), []).append(run)
    lines = []
    for (arm, iterations), runs in rows.items():
        cells = []
        for key in ("clip-embedded", "judge"):
            means = [run[key]["mean"] for run in runs]  # type: ignore[index]
            spread = torch.tensor(means).std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
            by_prompt = sum(run[key]["standard_error"] ** 2 for run in runs) ** 0.5 / len(runs)  # type: ignore[index,operator]
            cells.append(f"{key} {sum(means) / len(means):+.4f} ± {by_prompt:.4f} (seeds ± {spread:.4f})")
        lines.append(f"{arm:14} {iterations:4}  {'   '.join(cells)}  {len(runs)} seeds")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "gain", "summary"])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--arm", action="append", help="only this one; again for more")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.what == "summary":
        print(summary(json.loads(given.out.read_text())))
    elif given.what == "cost":
        found = cost(given.plan, given.rounds)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print({name: round(median(values), 3) for name, values in found["over_plain"].items()})
    else:
        gain(given.plan, given.iterations, given.seeds, given.prompts, given.arm, given.out)
        print(summary(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
