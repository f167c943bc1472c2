"""Progress on a terminal, in a log, or for machines."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.progress import Reporter, Silent


@dataclass(frozen=True)
class OutputOptions:
    """How a command that takes its time says what it does."""

    as_json: Annotated[bool, typer.Option("--json", help="JSON lines for machines.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False

    def reporter(self, *, talks: bool = True) -> Reporter:
        """Args:
        talks: of several processes one does.
        """
        return make_reporter(as_json=self.as_json, quiet=self.quiet or not talks)


def unwritable(out: Path) -> list[str]:
    """What is wrong with ``--out``, a file or folder that is there or not: said before hours of work are lost by it."""
    there = next(place for place in (out.absolute(), *out.absolute().parents) if os.path.lexists(place))
    if there == out.absolute() and not there.is_dir():
        return [f"--out {out}: is a file; give another name"]
    if not there.is_dir():
        return [f"--out {out}: {there} is no folder; give another"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"--out {out}: nothing may be written in {there}; give another folder, or change its permissions"]
    return []


def make_reporter(*, as_json: bool, quiet: bool) -> Reporter:
    """A bar on a terminal, plain lines in a log, JSON lines or nothing when asked."""
    if quiet:
        return Silent()
    if as_json:
        return JsonLines()
    return Bar() if sys.stderr.isatty() else PlainLines()


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class _Phase:
    """Counts one phase; rate and time left from its own start."""

    def __init__(self) -> None:
        self.name, self.total, self.done, self.before, self.start = "", 0, 0, 0, time.monotonic()

    def begin(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done, self.before, self.start = name, total, done, done, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds / max(1, self.done - self.before) * (self.total - self.done)

    @property
    def timing(self) -> str:
        rate = (self.done - self.before) / max(1e-9, self.seconds)
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(1e-9, rate):.1f} s each"
        return f"{pace}, {clock(self.left)} left"


class PlainLines:
    """One line at the start of a phase, then every few seconds, then at its end."""

    every = 10.0

    def __init__(self) -> None:
        self._phase, self._last = _Phase(), 0.0

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._phase.begin(name, total, done)
        self._last = time.monotonic()
        self.note(f"{name}: {done}/{total}")

    def advance(self, count: int = 1, text: str = "") -> None:
        phase = self._phase
        phase.done += count
        if phase.done >= phase.total or time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self.note(f"{phase.name}: {phase.done}/{phase.total}  {phase.timing}  {text}".rstrip())

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class JsonLines:
    """One JSON object a line on standard error."""

    def __init__(self) -> None:
        self._phase = _Phase()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._phase.begin(name, total, done)

    def advance(self, count: int = 1, text: str = "") -> None:
        phase = self._phase
        phase.done += count
        self._write({"phase": phase.name, "done": phase.done, "total": phase.total, "left_s": round(phase.left, 1)})
        del text

    def note(self, text: str) -> None:
        self._write({"note": text})

    def close(self) -> None:
        pass

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), file=sys.stderr, flush=True)


class Bar:
    """A rich progress bar, one line per phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )
        self._phase = _Phase()
        self._task: Any = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._phase.begin(name, total, done)
        self._bar.start()
        self._task = self._bar.add_task(name, total=total, completed=done, pace="", text="")

    def advance(self, count: int = 1, text: str = "") -> None:
        self._phase.done += count
        pace = self._phase.timing.split(",")[0]
        self._bar.update(self._task, advance=count, pace=pace, text=text)
        if all(task.finished for task in self._bar.tasks):
            self._bar.refresh()
            self._bar.stop()

    def note(self, text: str) -> None:
        self._bar.console.print(text)

    def close(self) -> None:
        # gives the cursor back
        self._bar.stop()
