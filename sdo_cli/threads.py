"""How many threads torch computes with, and how they wait for each other.

OpenMP runtimes let a thread that waits spin for milliseconds. Where other processes want its core too (a shared
machine, a container with a quota, CI) it uses up the time that the one it waits for needs, and a step takes ten times
as long. The runtimes read their variables once, when torch loads them: :func:`set_up` has to come before.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# by runtime: what makes its threads sleep soon, and with which variables a user has said how they wait. Not at once:
# waking them for every layer takes as long as the layer (docs/log.md)
WAITING = {
    # libgomp: torch's wheels for Linux; turns of an empty loop, its own default 300,000
    "GOMP_SPINCOUNT": ("5000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")),
    # LLVM's libomp (macOS) and Intel's libiomp5 (conda): milliseconds, their own default 200
    "KMP_BLOCKTIME": ("1", ("KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_WAIT_POLICY")),
}
THREADS = "OMP_NUM_THREADS"
_SET: dict[str, str] = {}


def set_up() -> None:
    """Say in the environment what the user has not: waiting threads sleep soon, and no more of them than cores.

    Without effect when torch is there already. Never changes a variable that is set.
    """
    if "torch" in sys.modules:
        return
    found = {name: value for name, (value, said) in WAITING.items() if not any(key in os.environ for key in said)}
    # runtimes see which cores they may use, but no quota; accelerate sees neither
    if THREADS not in os.environ and (given := cores()) < (os.cpu_count() or 1):
        found[THREADS] = str(given)
    os.environ.update(found)
    _SET.update(found)


def asked_threads() -> str | None:
    """``OMP_NUM_THREADS`` if the user set it; None where it is missing or :func:`set_up`'s."""
    value = os.environ.get(THREADS) or None
    return None if value == _SET.get(THREADS) else value


def cores(root: Path = Path("/")) -> int:
    """Cores this process may compute on at a time, at least 1: of the machine's those its affinity (``taskset``, Slurm)
    leaves it, and no more than the CPU quota of its cgroup and of those above it allows, rounded down.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    # macOS has no affinity
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.floor(min([count, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Of every cgroup this process is in that has one, in cores."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 has one tree, without a name
        for tree in {controllers, "cpu"} if controllers else {"", "unified"}:
            for folder in _upwards(root / "sys/fs/cgroup" / tree, path):
                with suppress(OSError, ValueError, ZeroDivisionError):
                    yield _quota(folder)


def _upwards(tree: Path, path: str) -> Iterator[Path]:
    """The group and those above it. In a container ``path`` may be the host's, and its own group is the tree's root."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield tree.joinpath(*parts[:length])


def _quota(group: Path) -> float:
    """Cores; infinite where nothing is limited.

    Raises:
        OSError, ValueError: the group says nothing.
    """
    if (both := group / "cpu.max").exists():
        quota, period = both.read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
