"""Waiting threads sleep, and there are no more than cores: said before torch is imported, unless a user did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdo_cli import threads
from sdo_cli.errors import EnvironmentFault
from sdo_cli.parallel import launch

ROOT = Path(__file__).parent.parent
PASSIVE = {name: value for name, (value, _) in threads.WAITING.items()}
NAMES = (*threads.WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY", threads.THREADS)
# says what the runtimes would read when torch loads them
TORCH = "import json, os\nprint(json.dumps(dict(os.environ)), flush=True)\nos._exit(0)\n"
# what accelerate's and torch's launchers give a worker
WORKER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
ENTRY = "import sys; sys.argv = ['sdo', *sys.argv[1:]]; from sdo_cli.cli.app import main; main()"
DRAW = ("sample", "a tiger")
WAYS = {
    "python -m": (("-m", "sdo_cli", *DRAW), {}),
    "console script": (("-c", ENTRY, *DRAW), {}),
    "launched worker": (("-u", "-m", "sdo_cli", *DRAW), WORKER),
    "library": (("-c", "import sdo_cli.training.loop"), {}),
    "rewards alone": (("-c", "import rewards.base"), {}),
    "fork server": (("-c", "import forked; forked.serve('nowhere')"), {}),
}


def environment(**own):
    kept = {key: value for key, value in os.environ.items() if key not in NAMES}
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))} | own


def seen_by_torch(folder, words, **own):
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(TORCH)
    env = environment(**own)
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    return {name: found[name] for name in NAMES if name in found}


@pytest.mark.parametrize("way", WAYS)
def test_said_when_torch_is_imported(way, tmp_path):
    words, own = WAYS[way]
    found = seen_by_torch(tmp_path, words, **own)
    assert found == PASSIVE | {name: own[name] for name in (threads.THREADS,) if name in own}


@pytest.fixture
def fresh(monkeypatch):
    """A process without torch and with nothing said, that may use all of eight cores."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(threads, "_SET", {})
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in NAMES:
        # also what the test's code sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def said():
    threads.set_up()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, set()),
        ({"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME"}),
        ({"KMP_BLOCKTIME": "7"}, {"GOMP_SPINCOUNT"}),
        ({"KMP_LIBRARY": "turnaround"}, {"GOMP_SPINCOUNT"}),
        ({"OMP_NUM_THREADS": "64"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
    ],
    ids=lambda found: " ".join(sorted(found)) or "none",
)
def test_a_users_own_are_left_alone(own, ours, fresh):
    for name, value in own.items():
        fresh.setenv(name, value)
    fresh.setattr(threads, "cores", lambda: 8 if threads.THREADS not in own else 2)
    assert said() == own | {name: PASSIVE[name] for name in ours}


def test_too_late_when_torch_is_there(fresh):
    fresh.setitem(sys.modules, "torch", object())
    fresh.setattr(threads, "cores", lambda: 2)
    assert said() == {}


def test_fewer_cores_than_the_machine_has(fresh):
    fresh.setattr(threads, "cores", lambda: 3)
    assert said() == PASSIVE | {threads.THREADS: "3"}
    assert threads.asked_threads() is None
    fresh.setenv(threads.THREADS, "5")
    assert threads.asked_threads() == "5"


@pytest.mark.parametrize(("own", "each"), [(None, "2"), ("5", "5")])
def test_processes_started_here_share_the_cores(own, each, fresh):
    fresh.setattr(threads, "cores", lambda: 4)
    fresh.setattr(launch, "cores", lambda: 4)
    if own:
        fresh.setenv(threads.THREADS, own)
    threads.set_up()
    given = []
    fresh.setattr(launch, "_under_accelerate", lambda count, faults: given.append(os.environ[threads.THREADS]))
    with pytest.raises(EnvironmentFault):
        launch.launch(2, cpu=False)
    assert given == [each]


GROUPS = {
    "version 2": ("0::/job/step", {"job/step/cpu.max": "250000 100000"}, 2),
    "the group above": ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
    "less than a core": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "in a container": ("0::/../job", {"cpu.max": "150000 50000"}, 3),
    "version 1": (
        "4:memory:/job\n3:cpu,cpuacct:/job\n0::/",
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1 in a container": (
        "3:cpuacct,cpu:/docker/1f",
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
        2,
    ),
    "no quota": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    "more than there is": ("0::/", {"cpu.max": "1600000 100000"}, 8),
    "another controller": ("2:cpuset:/", {"cpuset/cpu.cfs_quota_us": "100000"}, 8),
    "no cgroups": (None, {}, 8),
    "not understood": ("0::/", {"cpu.max": "?"}, 8),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_cores_under_a_quota(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    group, files, count = GROUPS[kind]
    if group is not None:
        files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": group}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert threads.cores(tmp_path) == count


@pytest.mark.skipif(not shutil.which("taskset") or (os.cpu_count() or 1) < 2, reason="needs taskset and two cores")
def test_cores_under_taskset():
    core = str(min(os.sched_getaffinity(0)))
    code = "import os, sdo_cli.threads as threads; print(threads.cores(), os.environ[threads.THREADS])"
    words = ["taskset", "-c", core, sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, env=environment()).stdout == "1 1\n"
