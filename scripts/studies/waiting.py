"""How torch's threads wait: seconds and CPU seconds of a training step as sdo sets it, with one thread, and as before.

    python scripts/studies/waiting.py --busy 6 --rounds 7          # beside six busy processes: default / one thread
    python scripts/studies/waiting.py --rounds 9 --arms default before         # on a quiet machine: default / before
    python scripts/studies/waiting.py --arms default GOMP_SPINCOUNT=1000,OMP_NUM_THREADS=2 before   # others

`before` imports torch before sdo, so libgomp waits as it does by itself. Every arm is a process that stays and takes a
turn a round, the order changing; each round gives a ratio of times. The busy processes are started and ended here. The
caller's own variables of OpenMP are taken out. Losses must agree: to the bit between arms with as many threads, to 1e-4
of their size else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ARMS = {"default": {}, "one thread": {"OMP_NUM_THREADS": "1"}, "before": {"SDO_STUDY_TORCH_FIRST": "1"}}
OURS = ("OMP_", "GOMP_", "KMP_", "MKL_")


def work(overrides: list[str], steps: int, turns: int) -> None:
    """One arm: trains ``steps`` steps for every line it reads, and answers with seconds, CPU seconds and losses."""
    if "SDO_STUDY_TORCH_FIRST" in os.environ:
        import torch
    import sdo_cli  # noqa: F401, I001
    import torch

    from sdo_cli.training.loop import train
    from sdo_cli.training.prepare import prepare
    from sdo_cli.recipe.load import load_recipe

    words = [*overrides, f"max_train_steps={steps * turns + 1}"]
    run = train(prepare(load_recipe("quickstart", words))[0])
    # the first step warms up
    next(run)
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        losses = [next(run).loss for _ in range(steps)]
        took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps({name: value / steps for name, value in took.items()} | {"losses": losses}), flush=True)


def environment(arm: str) -> dict[str, str]:
    """The caller's without its threads, with those of the arm: a name, or KEY=VALUE,KEY=VALUE."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    extra = ARMS[arm] if arm in ARMS else dict(pair.split("=", 1) for pair in arm.split(","))
    return {**own, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **extra}


class Arm:
    """A process that takes turns."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(name),
            text=True,
        )
        self.threads = 0

    def ready(self) -> None:
        self.threads = self._answer()["threads"]

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name!r} ended")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes beside it that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(arms: list[Arm], rounds: int) -> list[dict[str, dict[str, Any]]]:
    """A turn of every arm in each round; who begins changes."""
    found = []
    for number in range(rounds):
        first = number % len(arms)
        turns = {arm.name: arm.turn() for arm in arms[first:] + arms[:first]}
        found.append({arm.name: turns[arm.name] for arm in arms})
        said = ", ".join(f"{name} {turn['seconds']:.2f} s (CPU {turn['cpu']:.2f})" for name, turn in found[-1].items())
        print(f"round {number + 1}: {said} a step", flush=True)
    return found


def check_losses(arms: list[Arm], found: list[dict[str, dict[str, Any]]]) -> None:
    for one, other in combinations(arms, 2):
        for turn in found:
            for a, b in zip(turn[one.name]["losses"], turn[other.name]["losses"], strict=True):
                close = 0.0 if one.threads == other.threads else 1e-4 * max(abs(a), abs(b), 1e-3)
                if not abs(a - b) <= close:
                    sys.exit(f"losses of {one.name!r} and {other.name!r} differ: {a} and {b}")
    print("losses agree")


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def show(arms: list[Arm], found: list[dict[str, dict[str, Any]]]) -> None:
    print("| arm | threads | s a step | CPU s a step |\n|---|---|---|---|")
    for arm in arms:
        columns = [spread([turn[arm.name][key] for turn in found]) for key in ("seconds", "cpu")]
        print(f"| {arm.name} | {arm.threads} | {' | '.join(columns)} |")
    for other in arms[1:]:
        ratios = [turn[arms[0].name]["seconds"] / turn[other.name]["seconds"] for turn in found]
        print(f"{arms[0].name} / {other.name}: {spread(ratios)} of {len(found)} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--arms", nargs="+", default=["default", "one thread"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the quickstart recipe")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.set, given.steps, given.rounds)
        return
    words = [f"--steps={given.steps}", f"--rounds={given.rounds}", *(f"--set={word}" for word in given.set)]
    arms: list[Arm] = []
    try:
        for name in given.arms:
            arms.append(Arm(name, words))
        # loaded before the machine is busy
        for arm in arms:
            arm.ready()
        with busy(given.busy):
            found = compare(arms, given.rounds)
        check_losses(arms, found)
        show(arms, found)
    finally:
        for arm in arms:
            arm.end()


if __name__ == "__main__":
    main()
