"""``--gpus N``: this very command again in N processes, under accelerate.

accelerate's launcher ends the workers 30 seconds after a signal and makes a 1 of every exit code. So signals go from
here to the workers alone, who save and stop by themselves, and their codes come back in files.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.parallel.peers import LAUNCHED

FORWARDED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def launched() -> bool:
    """Whether this process was started as one of several, by us or by anyone."""
    return bool(os.environ.get("WORLD_SIZE"))


def wants_several(gpus: int | None, processes: int | None) -> int:
    """How many processes the two options ask for; 1 when this process is the job.

    Raises:
        RecipeFault: not a number of GPUs or processes this machine can give.
    """
    if launched() or (gpus is None and processes is None):
        return 1
    if gpus is not None and processes is not None:
        raise RecipeFault(["--processes: is for the CPU; give it or --gpus"], what="command line")
    name, count = ("--gpus", gpus) if gpus is not None else ("--processes", processes or 0)
    if count is None or count < 1:
        raise RecipeFault([f"{name}: must be at least 1, not {count}"], what="command line")
    if gpus is not None:
        import torch

        if gpus > (there := torch.cuda.device_count()):
            raise RecipeFault(
                [f"--gpus: this machine has {there}, not {gpus}; --processes N starts N on the CPU"],
                what="command line",
            )
    return count


def launch(count: int, *, cpu: bool) -> int:
    """Run this command in ``count`` processes on this machine and return the job's exit code.

    Raises:
        EnvironmentFault: accelerate cannot start them.
    """
    with tempfile.TemporaryDirectory(prefix="sdo-") as folder, _signals(Path(folder)) as forward:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
        os.environ |= {LAUNCHED: folder, "OMP_NUM_THREADS": threads, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
        faults: list[BaseException] = []
        # on a thread of its own the launcher leaves the signals to us
        thread = threading.Thread(target=_under_accelerate, args=(count, faults), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            forward()
        # this process is no worker
        del os.environ[LAUNCHED]
        return _exit_code(Path(folder), count, faults)


def _under_accelerate(count: int, faults: list[BaseException]) -> None:
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser

    # what it has to say of a worker that ended, we say in a sentence
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    words = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script = Path(sys.argv[0])
    # `python -m` puts the working folder first on the path, where a folder `rewards` may lie
    words += ["-m", "sdo_cli"] if script.name == "__main__.py" else ["--no_python", str(script)]
    try:
        launch_command(launch_command_parser().parse_args([*words, *sys.argv[1:]]))
    # also what it raises when a worker was killed
    except BaseException as fault:
        faults.append(fault)


@contextmanager
def _signals(folder: Path) -> Iterator[Any]:
    """Gather signals; ``forward()`` sends them to every worker that runs, also to one that starts later."""
    seen: list[int] = []
    sent: set[tuple[int, int]] = set()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)

    def forward() -> None:
        for path in folder.glob("pid-*"):
            for order, number in enumerate(seen):
                if (pid := int(path.read_text() or 0)) and (order, pid) not in sent:
                    sent.add((order, pid))
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)

    before = {name: signal.signal(getattr(signal, name), on_signal) for name in FORWARDED if hasattr(signal, name)}
    try:
        yield forward
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def tell_launcher() -> None:
    """A worker is ready for signals."""
    if folder := os.environ.get(LAUNCHED):
        path = Path(folder) / f"pid-{os.environ.get('RANK', '0')}"
        # renamed: never read half
        path.with_name(f".{path.name}").write_text(str(os.getpid()))
        path.with_name(f".{path.name}").rename(path)


def _exit_code(folder: Path, count: int, faults: list[BaseException]) -> int:
    """That of the first process that did not end well."""
    paths = [folder / f"exit-{rank}" for rank in range(count)]
    codes = [int(path.read_text()) if path.exists() else None for path in paths]
    if not any(folder.glob("pid-*")) and all(code is None for code in codes):
        said = str(faults[0]).strip().splitlines()[0] if faults else "they left no word"
        raise EnvironmentFault(
            f"the {count} processes could not be started: {said}", remedy="run it with --debug, or try one process"
        )
    told = [code for code in codes if code is not None]
    # one that left no code was killed
    return next((code for code in told if code), 1 if None in codes else 0)
