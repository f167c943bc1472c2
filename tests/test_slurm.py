"""Slow: the files of scripts/slurm/ under a real Slurm of one controller and two nodes on this machine's loopback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = [
    "single node: to its end",
    "scontrol requeue: saved, requeued, continued",
    "time limit: saved by --signal, requeued itself, continued",
    "time limit without --signal: saved, requeued itself, continued",
    "the same weights bit for bit: left alone, requeued, time limits",
    "bad input: exit code 2, not requeued",
    "signals before sdo listens: requeued itself, no oftener than allowed",
    "scancel: saved, and stays cancelled",
    "multi node: two nodes, saved by a signal, requeued itself, continued",
    "multi node: a task that dies ends the other, not requeued",
    "sweep: two tasks with a folder each, one requeued itself, continued",
]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin"),
    reason="needs Slurm: apt-get install slurm-wlm munge",
)
def test_jobs_are_saved_requeued_and_continued():
    process = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "test_slurm.sh")],
        env=os.environ | {"PYTHON": sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=1500)
    except subprocess.TimeoutExpired:
        # it ends its daemons and jobs
        process.terminate()
        said, _ = process.communicate()
    assert process.returncode == 0, said
    # a line ends with the seconds since the first
    well = [line.removeprefix("ok ").strip() for line in said.splitlines() if line.startswith("ok ")]
    assert [line.rpartition(" (")[0] for line in well] == CHECKS, said
