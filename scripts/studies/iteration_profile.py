"""Where the time of a training iteration goes: network, decoder, reward, and everything else.

    OMP_NUM_THREADS=1 python scripts/studies/iteration_profile.py           (the embedded model, a few settings)
    python scripts/studies/iteration_profile.py --recipe my.yaml train_batch_size=4
    python scripts/studies/iteration_profile.py --against compile=default --against channels_last=true

Calls and backward passes are timed where they are made, on a GPU waiting for it at both ends; what is left of the whole
iteration, optimizer included, is everything else. Prints a Markdown table: seconds, and shares of the iteration.
With --against it takes turns, iteration by iteration, with the same recipe changed, and prints the ratio of times.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from sdo_cli.recipe.load import load_recipe
from sdo_cli.records.step import StepResult
from sdo_cli.training.job import Job
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare

PARTS = ("network", "decoder", "reward", "backward of network", "backward of decoder and reward")
SETTINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("train_batch_size=1",),
    ("num_inference_steps=50", "guidance_scale=5"),
    ("num_inference_steps=50", "guidance_scale=5", "train_batch_size=1"),
)


class Spans:
    """Seconds by part; a call inside a timed one belongs to the outer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.inside = device, False
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if self.inside:
                return call(*args, **options)
            self.inside, start = True, self.now()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += self.now() - start
                self.inside = False

        return run


def watch(job: Job, spans: Spans) -> None:
    """Put a clock around everything that is network, decoder or reward, for the rest of this process."""
    job.family.network = spans.timed("network", job.family.network)  # type: ignore[method-assign]
    job.family.decode = spans.timed("decoder", job.family.decode)  # type: ignore[method-assign]
    for item in job.rewards:
        item.reward.score = spans.timed("reward", item.reward.score)  # type: ignore[method-assign]
    torch.autograd.grad = spans.timed("backward of decoder and reward", torch.autograd.grad)
    torch.Tensor.backward = spans.timed("backward of network", torch.Tensor.backward)  # type: ignore[method-assign]


def measure(recipe: str, overrides: list[str], iterations: int) -> dict[str, float]:
    """Median seconds of an iteration by part and in ``all``, after one that warms up."""
    job, _ = prepare(load_recipe(recipe, [*overrides, f"max_train_steps={iterations + 1}"]))
    spans = Spans(job.family.device)
    watch(job, spans)
    steps = train(job)
    next(steps)
    rounds = []
    for _ in range(iterations):
        spans.seconds.clear()
        start = spans.now()
        next(steps)
        whole = spans.now() - start
        rounds.append({**spans.seconds, "all": whole, "else": 1 - sum(spans.seconds.values()) / whole})
    return {name: median(found.get(name, 0.0) for found in rounds) for name in (*PARTS, "all", "else")}


def compare(recipe: str, overrides: list[str], changes: list[str], iterations: int) -> None:
    """Ratios of the seconds of an iteration, the rollout's too, of each change to the recipe without it; in turns."""
    every = {"": [], **{change: [change] for change in changes}}
    runs = {}
    for name, change in every.items():
        words = [*overrides, *change, f"max_train_steps={iterations + 1}"]
        runs[name] = train(prepare(load_recipe(recipe, words))[0])
        start = time.perf_counter()
        next(runs[name])
        print(f"first iteration {name or 'as it is'}: {time.perf_counter() - start:.0f} s", flush=True)
    rounds = [{name: _timed(run) for name, run in runs.items()} for _ in range(iterations)]
    for name in changes:
        for stage in [stage for stage in ("rollout", "all") if stage in rounds[0][name]]:
            ratios = sorted(found[name][stage] / found[""][stage] for found in rounds)
            print(f"{name}, {stage}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of {iterations} rounds")


def _timed(run: Iterator[StepResult]) -> dict[str, float]:
    """Seconds by stage, and of everything; the result was waited for."""
    start = time.perf_counter()
    result = next(run)
    return {**result.seconds, "all": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--against", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.against:
        compare(given.recipe, given.overrides, given.against, given.iterations)
        return
    plain = given.recipe == "quickstart" and not given.overrides
    print(f"| setting | s | {' | '.join(PARTS)} | everything else |")
    print("|---|---|" + "---|" * (len(PARTS) + 1))
    autograd, backward = torch.autograd.grad, torch.Tensor.backward
    for overrides in SETTINGS if plain else (tuple(given.overrides),):
        found = measure(given.recipe, list(overrides), given.iterations)
        torch.autograd.grad, torch.Tensor.backward = autograd, backward  # type: ignore[method-assign]
        shares = " | ".join(f"{found[part] / found['all']:.1%}" for part in PARTS)
        setting = " ".join((given.recipe, *overrides))
        print(f"| {setting} | {found['all']:.2f} | {shares} | {found['else']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
