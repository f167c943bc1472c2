"""Steering the embedded model's latents: objective reached for equal computation, and nearness to the full gradient.

    python scripts/studies/steering_rules.py gain --out work/steering-gain.json        (about an hour on one core)
    python scripts/studies/steering_rules.py nearness --out work/steering-nearness.json
    python scripts/studies/steering_rules.py cost --out work/steering-cost.json

``gain``: every rule gets the FLOPs of --iterations SDO iterations, counted by torch, decoder and reward included.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.bench.memory import peak_of_tensors
from sdo_cli.estimate.flops import count_flops
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.run import run_plan
from sdo_cli.recipe.steering import load_steering
from sdo_cli.scoring.rewards import score_images
from sdo_cli.scoring.statistics import paired_gain
from sdo_cli.seeding import keyed_generator
from sdo_cli.steering.job import Job, begin, objective_of, prepare
from sdo_cli.steering.steer import make_plan, nothing_yet, steer
from sdo_cli.steering.variables import as_leaves, spread

RULES: dict[str, tuple[str, dict[str, int]]] = {
    "sdo": ("sdo", {}),
    "sdo-0": ("sdo-0", {}),
    "last-1": ("draft-k", {"k": 1}),
    "full": ("full", {}),
}


def load(prompts: list[str], overrides: list[str]) -> Job:
    options = {"prompts": {"lines": prompts}, "measures": ["judge"]}
    return prepare(load_steering(None, options, overrides))


def held_out(count: int, first: int = 0) -> list[str]:
    lines = (Path(__file__).parent.parent.parent / "recipes/prompts/emoji-heldout.txt").read_text().splitlines()
    prompts = [line for line in lines if line.strip() and not line.startswith("#")]
    return prompts[first : first + count]


def with_rule(job: Job, name: str, **more: object) -> Job:
    rule, options = RULES[name]
    return replace(job, spec=replace(job.spec, rule=rule, rule_options=options, **more))


def one_gradient(job: Job, which: range, number: int = 0) -> Tensor:
    """Of the latents ``[B, …]``, at their first state."""
    begun = begin(job, which)
    state, _ = as_leaves(spread(begun.state, job.spec.variables, len(begun.canvas.levels())), job.spec.variables)
    path = begun.canvas.path(state)
    plan = make_plan(job.spec, path.coefficients, len(which), keyed_generator(0, "plan", number))
    run_plan(path, plan, objective_of(job, begun, which), terms=Terms(1.0), checkpointing=job.spec.checkpointing)
    assert path.x_0.grad is not None
    return path.x_0.grad


def flops_of(job: Job, name: str) -> float:
    """Of one gradient of one image; what begins it is the same for all and left out."""
    whole = count_flops(lambda: one_gradient(with_rule(job, name), range(1)))
    return whole - count_flops(lambda: begin(job, range(1)))


def gain(arguments: argparse.Namespace) -> dict[str, object]:
    job = load(held_out(arguments.prompts), ["batch_size=32", *arguments.overrides])
    cost = {name: flops_of(job, name) for name in RULES}
    found: dict[str, object] = {"flops": cost}
    which = range(len(job.prompts))
    for name in arguments.rules or RULES:
        steps = max(1, round(arguments.iterations * cost["sdo"] / cost[name]))
        mine = with_rule(job, name, steps=steps)
        begun = begin(mine, which)
        first = last = None
        canvas = mine.canvas(which)
        best = nothing_yet(canvas, mine.spec, begun.state)
        values: list[float] = []
        for step in steer(canvas, mine.spec, begun.state, objective_of(mine, begun, which), best):
            first, last = first or step, step
            values.append(-step.losses.mean().item())
            print(name, step.number, f"{values[-1]:.4f}", flush=True)
        assert first is not None and last is not None
        judge = job.measures["judge"]
        ends = [score_images(judge, step.images, job.prompts) for step in (first, last)]
        away = (last.images - first.images).abs().flatten(1).mean(1)
        found[name] = {
            "steps": steps,
            "objective": _gain(-first.losses, -best.losses),
            "judge": _gain(*ends),
            "L1 to the first image": [away.mean().item(), (away.std() / len(away) ** 0.5).item()],
            "curve": values,
        }
        arguments.out.write_text(json.dumps(found, indent=1))
    return found


def _gain(before: Tensor, after: Tensor) -> dict[str, float]:
    found = paired_gain(before[:, None], after[:, None])
    gained = found.difference
    return {
        "before": found.before.mean,
        "after": found.after.mean,
        "gain": gained.mean,
        "error": gained.standard_error,
    }


def nearness(arguments: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {}
    for start in (0, 10, 25, 40, 45, 49):
        job = load(held_out(arguments.prompts), [f"start={start}", *arguments.overrides])
        which = range(len(job.prompts))
        full = one_gradient(with_rule(job, "full"), which).flatten(1)
        row = {}
        for name in ("sdo", "sdo-0", "last-1"):
            cosine = torch.cosine_similarity(one_gradient(with_rule(job, name), which).flatten(1), full, dim=1)
            row[name] = [cosine.mean().item(), (cosine.std() / len(cosine) ** 0.5).item()]
        found[str(start)] = row
        print(start, row, flush=True)
    return found


def cost(arguments: argparse.Namespace) -> dict[str, object]:
    """Time and FLOPs per iteration side by side, and memory against the number of steps."""
    job = load(held_out(2), arguments.overrides)
    kinds = {
        "sdo": with_rule(job, "sdo"),
        "full": with_rule(job, "full"),
        "full, kept": with_rule(job, "full", checkpointing=False),
    }
    flops = {name: count_flops(partial(one_gradient, mine, range(2))) for name, mine in kinds.items()}
    rounds = []
    for number in range(arguments.rounds + 1):
        seconds = {}
        for name, mine in kinds.items():
            start = time.perf_counter()
            one_gradient(mine, range(2), number)
            seconds[name] = time.perf_counter() - start
        # the first one warms up
        if number:
            rounds.append({name: seconds["sdo"] / seconds[name] for name in ("full", "full, kept")})
            print(rounds[-1], flush=True)
    memory = {}
    for steps in (10, 50):
        few = replace(job, settings=replace(job.settings, num_inference_steps=steps))
        for name in kinds:
            mine = with_rule(few, name.partition(",")[0], checkpointing=name != "full, kept")
            memory[f"{name}, N = {steps}"] = peak_of_tensors(lambda mine=mine: one_gradient(mine, range(2)))
    return {"flops": {k: flops["sdo"] / v for k, v in flops.items()}, "time": rounds, "peak bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gain", "nearness", "cost"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rules", nargs="*")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"gain": gain, "nearness": nearness, "cost": cost}[arguments.what](arguments)
    arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
