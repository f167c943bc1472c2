"""Everything that has to be measured on a GPU, in one call: tests, seconds, memory, stages, bounds; targets met or not.

    python scripts/gpu/check.py --out check.json                 on a GPU; 10 minutes, random weights, no network
    python scripts/gpu/check.py --count [--gpu H100]             FLOPs (seconds estimated), without GPU and weights
    python scripts/gpu/check.py --tiny --only sd --only sdxl     the script itself, tried on the CPU

Arms (gradient rules) take turns in every round; ratios are medians over rounds. What there is no time for is left out,
the least important first, and said. The table comes last; FILE holds every round and is written after every part.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

if TYPE_CHECKING:
    from gpu.arms import Cell
    from gpu.count import Counted
    from gpu.measure import Measured, Stand

NEEDED = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "open_clip", "ftfy", "omegaconf")
NEEDED = (*NEEDED, "typer", "safetensors")
PARTS = ("tests", "sd", "sdxl", "compile")
# seconds: for saying what was found, for making and loading SDXL and a look at it, for compiling, for another layout
RESERVE, SDXL, COMPILE, LAYOUT = 15, 150, 120, 60
# imports are part of the time that was given
BEGUN = time.monotonic()
TESTS_AT_MOST = 180


def missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Check:
    """One run: parts in order of importance, what they found, how much time is left."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        from gpu.arms import FULL_SIZE, TINY
        from gpu.measure import Clock

        from sdo_cli.device import pick_device

        self.given, self.folder, self.device = given, folder, pick_device()
        self.clock: Clock = Clock(given.minutes - RESERVE / 60, BEGUN)
        self.cells: tuple[Cell, ...] = TINY if given.tiny else FULL_SIZE
        self.measured: list[Measured] = []
        self.record, self.speed = self._head(), None
        for cell in self.cells if given.tiny else ():
            make_model(cell, folder, "cpu")
        self.counting = _start_counting(given, folder) if {"sd", "sdxl"} & set(given.only) else None

    def _head(self) -> dict[str, Any]:
        from sdo_cli.provenance import machine, now, versions

        return {
            "command": shlex.join(["python", "scripts/gpu/check.py", *sys.argv[1:]]),
            "date": now(),
            "machine": machine(),
            "versions": versions(),
            "rounds": self.given.rounds,
            "tests": None,
            "speed": None,
            "cells": [],
            "compile": None,
            "channels_last": None,
            "left_out": [],
            "targets": [],
        }

    def run(self) -> None:
        if "tests" in self.given.only:
            say("GPU tests")
            self.record["tests"] = gpu_tests(min(TESTS_AT_MOST, self.clock.left / 3))
        self._speed()
        stands: list[Stand] = []
        self._part("SD 1.5", lambda: self._sd(stands))
        if "sdxl" in self.given.only:
            self._part("SDXL", self._sdxl)
        if "compile" in self.given.only and stands:
            self._compile(stands[0])
        self.record["seconds"] = self.clock.spent
        self.save()

    def _part(self, name: str, run: Callable[[], None]) -> None:
        """What goes wrong in one part costs that part."""
        try:
            run()
        except Exception as fault:
            traceback.print_exc()
            self.record["left_out"].append(f"{name}: {type(fault).__name__}: {str(fault).splitlines()[0][:200]}")

    def save(self) -> None:
        """What there is so far: a run that is cut off leaves its figures."""
        from gpu.report import cell_record, targets_of

        from sdo_cli.files import write_json

        assert self.speed is not None
        counted = self.counted if self.measured else {}
        self.record["cells"] = [cell_record(found, counted.get(found.cell.name), self.speed) for found in self.measured]
        first = self.record["cells"][0] if "sd" in self.given.only and self.record["cells"] else None
        self.record["targets"] = targets_of(first, self.record["compile"])
        write_json(self.given.out, self.record)

    @property
    def counted(self) -> "dict[str, Counted]":
        """Nothing where counting failed or has not ended: seconds and memory are worth keeping without it."""
        from gpu.count import from_json

        try:
            if self.counting is None or self.counting.wait(timeout=max(1.0, self.clock.left)) != 0:
                return {}
        except subprocess.TimeoutExpired:
            return {}
        return from_json(json.loads((self.folder / "counted.json").read_text()))

    def _speed(self) -> None:
        from gpu.report import speed_record

        from sdo_cli.estimate.measuring import measure_speed

        precisions = tuple(dict.fromkeys(("no", *(cell.precision for cell in self.cells))))
        self.speed = measure_speed(self.device, precisions)
        self.record["speed"] = speed_record(self.speed)

    def _kept(self, *parts: str) -> float:
        """Seconds that later parts need."""
        needs = {"sdxl": SDXL, "compile": COMPILE}
        return sum(needs[part] for part in parts if part in self.given.only and not self.given.tiny)

    def _sd(self, stands: "list[Stand]") -> None:
        """Both batches, of one model that is loaded once."""
        if not {"sd", "compile"} & set(self.given.only):
            return
        stand = self._open(self.cells[0])
        stands.append(stand)
        if "sd" in self.given.only:
            self._measure(stand, 0.65 * (self.clock.left - self._kept("sdxl", "compile")))
            self._measure(stand.with_cell(self.cells[1]), self.clock.left - self._kept("sdxl", "compile"))

    def _sdxl(self) -> None:
        if self.clock.left < self._kept("sdxl", "compile"):
            self.record["left_out"].append(f"{self.cells[2].name}: no time")
            return
        self._measure(self._open(self.cells[2]), self.clock.left - self._kept("compile"))

    def _open(self, cell: "Cell") -> "Stand":
        from gpu.measure import open_stand

        say(f"weights of {cell.kind}")
        make_model(cell, self.folder, self.device.type)
        # pipelines hold themselves in cycles; on a GPU they would fall into somebody's measured iteration
        gc.collect()
        return open_stand(cell, self.folder)

    def _measure(self, stand: "Stand", seconds: float) -> None:
        from gpu.measure import measure_cell

        # SDXL's weights are made in this time too
        seconds = min(seconds, self.clock.left)
        self.measured.append(
            measure_cell(stand, self.clock, seconds=seconds, rounds=self.given.rounds, reporter=Lines())
        )
        self.save()

    def _compile(self, stand: "Stand") -> None:
        from gpu.measure import measure_changed
        from gpu.report import changed_record

        # at tiny size the way through the script is tried, not the compiler
        mode = "none" if self.given.tiny else "default"
        words = {"compile": (f"compile={mode}", COMPILE), "channels_last": ("channels_last=true", LAYOUT)}

        def measure(name: str, word: str) -> None:
            found = measure_changed(stand, self.folder, word, self.clock, rounds=self.given.rounds, reporter=Lines())
            self.record[name] = changed_record(found)
            self.save()

        for name, (word, needs) in words.items():
            if self.clock.left < needs and not self.given.tiny:
                self.record["left_out"].append(f"{word}: no time")
            else:
                self._part(word, partial(measure, name, word))


def make_model(cell: "Cell", folder: Path, device: str) -> None:
    """Random weights in the real file format."""
    if cell.tiny and (folder / cell.kind).exists():
        return
    if cell.tiny:
        sys.path.append(str(ROOT / "tests"))
        from small_models import make_small

        make_small(cell.kind, folder)
        return
    from full_size_step import make_weights

    make_weights(cell.kind, folder, device)


def _start_counting(given: argparse.Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """FLOPs are counted on the CPU while the GPU is busy."""
    command = [sys.executable, __file__, "--count", "--folder", str(folder), "--out", str(folder / "counted.json")]
    words = ["--tiny"] if given.tiny else []
    words += [word for part in given.only if part in ("sd", "sdxl") for word in ("--only", part)]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)


def gpu_tests(seconds: float) -> dict[str, Any]:
    """The project's tests that need a GPU; the last lines of what they say are kept when some fail."""
    if importlib.util.find_spec("pytest") is None:
        return {"summary": "not run: pytest is not installed", "code": None, "seconds": 0.0}
    # the project's tests hide GPUs unless they are asked for
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # the commands that tests run too: they would go on beside what is measured
            os.killpg(process.pid, signal.SIGKILL)
            return {"summary": f"not finished in {seconds:.0f} s", "code": None, "seconds": seconds}
    lines = [line for line in said.splitlines() if line.strip()]
    took = re.search(r"in ([0-9.]+)s", lines[-1] if lines else "")
    found = {"summary": lines[-1] if lines else "nothing said", "code": process.returncode}
    return found | {"seconds": float(took[1]) if took else None, "tail": lines[-60:] if process.returncode else []}


class Lines:
    """Progress as lines on stderr."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        del total, done
        say(name)

    def advance(self, count: int = 1, text: str = "") -> None:
        del count
        say(f"  {text}")

    def note(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def count(given: argparse.Namespace, folder: Path) -> None:
    """The tables of FLOPs; figures go into ``--out``, where it is given."""
    from gpu.arms import FULL_SIZE, TINY
    from gpu.count import as_json, count_cells, count_table

    from sdo_cli.estimate.gpus import find_gpu
    from sdo_cli.files import write_json

    cells = TINY if given.tiny else FULL_SIZE
    wanted = [cell for cell in cells if ("sdxl" if cell.kind == "sdxl" else "sd") in given.only]
    for cell in wanted:
        if cell.tiny:
            make_model(cell, folder, "cpu")
    found = count_cells(tuple(wanted), folder)
    speed = find_gpu(given.gpu).speed if given.gpu else None
    print("\n\n".join(f"{name}\n\n{count_table(counted, speed)}" for name, counted in found.items()))
    if given.out:
        write_json(given.out, as_json(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON; gpu-check.json by default")
    parser.add_argument("--minutes", type=float, default=9.5, help="it is over by then; 9.5")
    parser.add_argument("--rounds", type=int, help="timed rounds at most; 5, with --tiny 2")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; again for more; all by default")
    parser.add_argument("--folder", type=Path, help="keep the random weights here, or take those that are")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU: a test of this script")
    parser.add_argument("--count", action="store_true", help="count FLOPs only")
    parser.add_argument("--gpu", help="with --count: estimate seconds on this GPU, as `sdo doctor --gpu` names it")
    given = parser.parse_args()
    given.only = given.only or list(PARTS)
    given.rounds = given.rounds or (2 if given.tiny else 5)
    return given


def main() -> None:
    given = parse()
    if lacking := missing():
        raise SystemExit(f"gpu-check: {', '.join(lacking)} not installed here; pip install them, or `make setup`")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # arms leave holes of different sizes behind
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if given.tiny:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        count(given, folder.resolve()) if given.count else check(given, folder.resolve())


def check(given: argparse.Namespace, folder: Path) -> None:
    import torch
    from gpu.report import report

    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("gpu-check: no CUDA GPU here; --tiny tries this script on the CPU, --count counts FLOPs")
    given.out = given.out or Path("gpu-check.json")
    run = Check(given, folder)
    try:
        run.run()
    finally:
        if run.counting is not None:
            run.counting.kill()
    print(report(run.record))
    if (run.record["tests"] or {}).get("code"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
