"""Commands that several processes carry out together, and that can be stopped and started again."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.errors import Interrupted, Preempted, Stopped
from sdo_cli.installed import sdo


@dataclass(frozen=True)
class ProcessOptions:
    gpus: Annotated[int | None, typer.Option(help="So many processes on this machine, a GPU each.")] = None
    processes: Annotated[int | None, typer.Option(help="So many processes on the CPU.")] = None

    @property
    def words(self) -> list[str]:
        """As they were typed."""
        named = (("--gpus", self.gpus), ("--processes", self.processes))
        return [word for name, count in named if count is not None for word in (name, str(count))]


def in_several_processes(asked: ProcessOptions) -> None:
    """Start the command again in so many processes and end with their exit code; nothing for one.

    Raises:
        RecipeFault: more than there is.
    """
    if asked.gpus is None and asked.processes is None:
        return
    from sdo_cli.parallel.launch import launch, wants_several

    if (count := wants_several(asked.gpus, asked.processes)) > 1:
        raise typer.Exit(launch(count, cpu=asked.processes is not None))
    if asked.processes is not None:
        # on the CPU, also when it is one
        os.environ["ACCELERATE_USE_CPU"] = "true"


def again(*more: str) -> list[str]:
    """The words typed after ``sdo``, but for the folder, which is not known yet, and with ``more`` words."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--out" and not word.startswith("--out="):
            words.append(word)
        skip = word == "--out"
    return [*words, *(word for word in more if word not in words)]


@contextmanager
def stopped_well(
    folder: Callable[[], Path | None], *more: str, line: Callable[[Path], str] | None = None
) -> Iterator[None]:
    """Signals, Ctrl-C and time limits end in a sentence with the command that goes on.

    Args:
        folder: where the work is kept; None as long as there is none.
        more: words that make the same command go on.
        line: what to type, where that is another command.

    Raises:
        Preempted, Interrupted: stopped; after Ctrl-C it is the latter.
    """
    try:
        yield
    except KeyboardInterrupt:
        there = folder()
        what = f"{there}/ is not finished" if there else "nothing was begun"
        raise Interrupted(f"interrupted; {what}", remedy=_going_on(there, more, line)) from None
    except Stopped as stop:
        kind, there = Interrupted if stop.reason == "SIGINT" else Preempted, folder()
        what = f"stopped ({stop.reason}); what is done is kept in {there}/"
        raise kind(what, remedy=_going_on(there, more, line)) from None


def _going_on(folder: Path | None, more: tuple[str, ...], line: Callable[[Path], str] | None) -> str:
    if folder is None:
        return ""
    return f"go on with: {line(folder) if line else sdo(*again(*more), '--out', folder)}"
