"""Throughput of two processes that train one model, through accelerate, against two runs that go alone.

    python scripts/studies/two_processes.py [--rounds 5] [--steps 8] [key=value …]

Both have two processes of one thread each, side by side on this machine, with the same samples per process and step;
they take turns. Prints a line per round and the median ratio: 1 means that exchanging gradients and metrics is free.
The second ratio is what the two that go alone would keep if they had to wait for each other at every step: noise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

WARM_UP = 2
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"


def work(out: Path, steps: int, overrides: list[str]) -> None:
    """One process: the training loop of the recipe; writes samples per second after the warm-up."""
    from sdo_cli.parallel.world import joined
    from sdo_cli.recipe.load import load_recipe
    from sdo_cli.training.loop import train
    from sdo_cli.training.prepare import prepare

    with joined() as world:
        words = [*overrides, f"max_train_steps={steps + WARM_UP}"]
        job, _ = prepare(load_recipe("quickstart", words), world)
        ends = [time.perf_counter() for _ in train(job)]
        seconds = [after - before for before, after in pairwise(ends[WARM_UP - 1 :])]
        found = {"seconds": seconds, "samples": job.recipe.train_batch_size, "processes": world.size}
        (out / f"{os.getpid()}.json").write_text(json.dumps(found))


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}


def rates(commands: list[list[str]], out: Path, processes: int) -> tuple[float, float]:
    """Samples per second of all commands, run at the same time; and if they had waited for each other at every step."""
    with (out / "said").open("w+") as said:
        running = [subprocess.Popen(command, env=environment(), stderr=said) for command in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            said.seek(0)
            sys.exit(said.read())
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(found) == 2 and all(one["processes"] == processes for one in found), found
    samples, (mine, theirs) = found[0]["samples"], (one["seconds"] for one in found)
    alone = sum(samples * len(seconds) / sum(seconds) for seconds in (mine, theirs))
    return alone, 2 * samples * len(mine) / sum(map(max, zip(mine, theirs, strict=True)))


def one_round(steps: int, overrides: list[str], number: int) -> tuple[float, float, float]:
    """Samples per second together, apart, and apart with waiting; who goes first changes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split()]
    found = {}
    for together in (True, False) if number % 2 else (False, True):
        with tempfile.TemporaryDirectory() as folder:
            worker = [__file__, "--worker", folder, "--steps", str(steps), *overrides]
            commands = [[*launch, *worker]] if together else [[sys.executable, *worker]] * 2
            found[together] = rates(commands, Path(folder), 2 if together else 1)
    return found[True][0], *found[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.steps, given.overrides)
        return
    ratios = []
    for number in range(given.rounds):
        together, apart, waiting = one_round(given.steps, given.overrides, number)
        ratios.append((together / apart, waiting / apart))
        said = f"{ratios[-1][0]:.3f}; waiting at every step alone {ratios[-1][1]:.3f}"
        print(f"round {number + 1}: {together:.2f} samples/s together, {apart:.2f} apart, {said}", flush=True)
    for name, every in zip(("together / apart", "waiting alone"), zip(*ratios, strict=True), strict=True):
        print(f"{name}: median {median(every):.3f} ({min(every):.3f} to {max(every):.3f})")


if __name__ == "__main__":
    main()
