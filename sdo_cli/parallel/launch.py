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

from sdo_cli.errors import EnvironmentFault, RecipeFault, first_line
from sdo_cli.parallel.peers import LAUNCHED
from sdo_cli.threads import THREADS, asked_threads, cores

FORWARDED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def launched() -> bool:
    """Whether this process was started as one of several, by us or by anyone."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


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
    with tempfile.TemporaryDirectory(prefix="sdo-") as folder, _signals(Path(folder)) as signals:
        threads = asked_threads() or str(max(1, cores() // count))
        os.environ |= {LAUNCHED: folder, THREADS: threads, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
        faults: list[BaseException] = []
        # on a thread of its own the launcher leaves the signals to us
        thread = threading.Thread(target=_under_accelerate, args=(count, faults), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
                signals.forward()
        finally:
            # this process is no worker
            del os.environ[LAUNCHED]
        return _exit_code(Path(folder), count, faults, signals.seen)


def _under_accelerate(count: int, faults: list[BaseException]) -> None:
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser

    # what it has to say of a worker that ended, we say in a sentence
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    words = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    # said here, whatever the user's own configuration of accelerate says
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--gpu_ids", "all"]
    script = Path(sys.argv[0])
    # `python -m` puts the working folder first on the path, where a folder `rewards` may lie
    words += ["-m", "sdo_cli"] if script.name == "__main__.py" else ["--no_python", str(script)]
    try:
        launch_command(launch_command_parser().parse_args([*words, *sys.argv[1:]]))
    # also what it raises when a worker was killed
    except BaseException as fault:
        faults.append(fault)


class _Forwarded:
    """Signals that came, and which worker has had which."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[int] = []
        self._folder, self._sent = folder, set[tuple[int, int]]()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.seen.append(number)

    def forward(self) -> None:
        """To every worker that runs, also to one that started after the signal."""
        for path in self._folder.glob("pid-*"):
            pid = int(path.read_text())
            for order, number in enumerate(self.seen):
                if (order, pid) not in self._sent:
                    self._sent.add((order, pid))
                    with suppress(OSError):
                        os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)


@contextmanager
def _signals(folder: Path) -> Iterator[_Forwarded]:
    found = _Forwarded(folder)
    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    before = {number: signal.signal(number, found.on_signal) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_launcher() -> None:
    """A worker is ready for signals."""
    if folder := os.environ.get(LAUNCHED):
        path = Path(folder) / f"pid-{os.environ.get('RANK', '0')}"
        # renamed: never read half
        path.with_name(f".{path.name}").write_text(str(os.getpid()))
        path.with_name(f".{path.name}").rename(path)


def _exit_code(folder: Path, count: int, faults: list[BaseException], seen: list[int]) -> int:
    """That of the first process that did not end well."""
    paths = [folder / f"exit-{rank}" for rank in range(count)]
    codes = [int(path.read_text()) if path.exists() else None for path in paths]
    told = [code for code in codes if code is not None]
    if bad := next((code for code in told if code), 0):
        return bad
    if None not in codes:
        return 0
    if seen:
        # ended by it before they listened
        return 128 + seen[0]
    if not any(folder.glob("pid-*")):
        why = first_line(faults[0]) if faults else "they left no word"
        raise EnvironmentFault(
            f"the {count} processes could not be started: {why}", remedy="run it with --debug, or try one process"
        )
    # one that left no code was killed
    return 1
