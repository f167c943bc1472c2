"""Commands that several processes carry out together, and that can be stopped and started again."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from sdo_cli.errors import Interrupted, Preempted, Stopped


def in_several_processes(gpus: int | None, processes: int | None) -> None:
    """Start the command again in so many processes and end with their exit code; nothing for one.

    Raises:
        RecipeFault: more than there is.
    """
    if gpus is None and processes is None:
        return
    from sdo_cli.parallel.launch import launch, wants_several

    if (count := wants_several(gpus, processes)) > 1:
        raise typer.Exit(launch(count, cpu=processes is not None))


@contextmanager
def stopped_well(folder: Callable[[], Path | None], again: list[str]) -> Iterator[None]:
    """Signals, Ctrl-C and time limits end in a sentence with the command that goes on.

    Args:
        folder: where the work is kept; None as long as there is none.
        again: the command but for its folder.

    Raises:
        Preempted, Interrupted: stopped; after Ctrl-C it is the latter.
    """
    try:
        yield
    except KeyboardInterrupt:
        there = folder()
        remedy = f"go on with: {shlex.join([*again, '--out', str(there)])}" if there else ""
        raise Interrupted(
            f"interrupted; {f'{there}/ is not finished' if there else 'nothing is lost'}", remedy=remedy
        ) from None
    except Stopped as stop:
        kind, there = Interrupted if stop.reason == "SIGINT" else Preempted, folder()
        raise kind(
            f"stopped ({stop.reason}); what is done is kept in {there}/",
            remedy=f"go on with: {shlex.join([*again, '--out', str(there)])}",
        ) from None
