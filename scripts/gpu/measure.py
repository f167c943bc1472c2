"""Seconds and peak memory of every arm of gpu/check.py, in the time there is."""

import gc
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from gpu.arms import Cell, load_arms, write_recipe

from sdo_cli.bench.bench_job import Workbench, new_adapter, open_workbench
from sdo_cli.bench.cost import Cost, one_iteration, timed
from sdo_cli.bench.memory import Memory, measure_here
from sdo_cli.bench.run import MOVED
from sdo_cli.bench.variants import Variant, load_variants
from sdo_cli.progress import Reporter
from sdo_cli.training.job import Job

# full backpropagation takes about three times SDO's seconds, and is the dearest arm
DEAREST = 3
NO_TIME = "no time"
NO_MEMORY = "does not fit into memory"


class Clock:
    """What is left of the time that was given."""

    def __init__(self, minutes: float, begun: float | None = None) -> None:
        self.start = time.monotonic() if begun is None else begun
        self.end = self.start + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def until(self, seconds: float) -> float:
        """The moment in so many seconds, as :attr:`left` will show it then."""
        return self.left - seconds


@dataclass
class Measured:
    """One cell: by arm what was measured, why arms are missing."""

    cell: Cell
    arms: dict[str, tuple[Cost, Memory]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Stand:
    """A cell's models, loaded; arms by name, the most important first."""

    cell: Cell
    bench: Workbench
    arms: dict[str, Variant]
    # the bench forgets those that do not fit, which a smaller batch may
    jobs: dict[Variant, Job]

    def with_cell(self, cell: Cell) -> "Stand":
        """The same models at another batch."""
        jobs = {v: replace(j, recipe=replace(j.recipe, train_batch_size=cell.batch)) for v, j in self.jobs.items()}
        return Stand(cell, Workbench(jobs, None, self.bench.order), self.arms, jobs)


def open_stand(cell: Cell, folder: Path) -> Stand:
    arms = load_arms(cell, folder)
    bench = open_workbench(dict(arms.values()))
    new_adapter(bench, seed=0, moved=MOVED)
    return Stand(cell, bench, {name: variant for name, (variant, _) in arms.items()}, bench.jobs)


def measure_cell(stand: Stand, clock: Clock, *, seconds: float, rounds: int, reporter: Reporter) -> Measured:
    """Peak memory of every arm, which warms it up; then rounds in which all arms have their turn.

    Args:
        seconds: to be spent at most; arms are left out for it from the end, rounds too, but for one.
    """
    found, until = Measured(stand.cell), clock.until(seconds)
    reporter.phase(stand.cell.name, len(stand.arms) + rounds)
    first = next(iter(stand.arms.values()))
    gc.collect()
    # libraries take workspaces at their first use: they belong to nobody's peak
    once = timed(partial(measure_here, stand.bench, first), stand.bench.any_job.family.device)
    spent = 0.0
    for name, variant in stand.arms.items():
        # its own turn, and a round of everything
        if spent and clock.left - until < DEAREST * once + spent + DEAREST * once:
            found.left_out[name] = NO_TIME
            continue
        start = clock.left
        _fit(stand, found, name, variant, reporter)
        spent += start - clock.left
        reporter.advance(1, name)
    _rounds(stand, found, clock, until=until, rounds=rounds, reporter=reporter)
    return found


def _fit(stand: Stand, found: Measured, name: str, variant: Variant, reporter: Reporter) -> None:
    try:
        memory = measure_here(stand.bench, variant)
    except torch.OutOfMemoryError:
        found.left_out[name] = NO_MEMORY
        stand.bench.leave_out(variant, reporter)
    else:
        found.arms[name] = Cost(recomputed=variant.checkpointing(stand.bench.jobs[variant].recipe)), memory


def _rounds(stand: Stand, found: Measured, clock: Clock, *, until: float, rounds: int, reporter: Reporter) -> None:
    longest = 0.0
    for number in range(rounds):
        if number and clock.left - until < longest:
            return
        start = clock.left
        for name, (cost, _) in list(found.arms.items()):
            try:
                one_iteration(stand.bench, stand.arms[name], cost, step=1 + number)
            except torch.OutOfMemoryError:
                # ratios are of whole rounds: nothing of it is kept
                found.left_out[name] = NO_MEMORY
                del found.arms[name]
                stand.bench.leave_out(stand.arms[name], reporter)
        longest = max(longest, start - clock.left)
        reporter.advance(1, f"round {number + 1}")


@dataclass
class Changed:
    """A word of the recipe off and on, round by round; ``first`` is the seconds of the first iteration with it."""

    arm: str
    word: str
    first: float
    off: Cost = field(default_factory=Cost)
    on: Cost = field(default_factory=Cost)
    peak_on: Memory | None = None


def measure_changed(stand: Stand, folder: Path, word: str, clock: Clock, *, rounds: int, reporter: Reporter) -> Changed:
    """SDO with ``word`` (``compile=default``) in its recipe, beside SDO without on the same machine."""
    arm, plain = next(iter(stand.arms.items()))
    loaded = load_variants(str(write_recipe(stand.cell, folder)), [word], [plain.name])
    bench = open_workbench(loaded)
    new_adapter(bench, seed=0, moved=MOVED)
    (variant,) = loaded
    reporter.phase(word, rounds)
    gc.collect()
    # both are warm when the rounds begin
    measure_here(stand.bench, plain)
    found = Changed(arm, word, timed(partial(measure_here, bench, variant), bench.any_job.family.device))
    found.peak_on = measure_here(bench, variant)
    for number in range(rounds):
        start = clock.left
        one_iteration(stand.bench, plain, found.off, step=1 + number)
        one_iteration(bench, variant, found.on, step=1 + number)
        reporter.advance(1, f"round {number + 1}")
        if clock.left < start - clock.left:
            break
    return found
