"""Cores of the machine, and how many of them this process may use."""

import os
from pathlib import Path

QUOTAS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores left by the affinity of this process and the CPU quota of its container; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _quota() -> float | None:
    """Cores' worth of time a second that the control group of this process gets (versions 2 and 1); None without."""
    try:
        if (QUOTAS / "cpu.max").is_file():
            limit, period = (QUOTAS / "cpu.max").read_text().split()
        else:
            limit, period = ((QUOTAS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(limit) / float(period) if limit != "max" and float(limit) > 0 else None
    except (OSError, ValueError):
        return None
