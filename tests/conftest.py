import fcntl
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only wait for each other
# threads of commands that tests start, and of tests that want several, wait as users' do
import sdo_cli  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """small(kind) -> folder, made once for all workers; nobody writes into it."""
    from small_models import make_small, read_tokenizers_once

    base = tmp_path_factory.getbasetemp()
    # the workers' own folders lie side by side
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small"
    root.mkdir(exist_ok=True)
    read_tokenizers_once(root)

    def folder(kind):
        with (root / f"{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / kind).exists():
                staged = root / f".{kind}"
                staged.mkdir()
                make_small(kind, staged).rename(root / kind)
        return root / kind

    return folder


@pytest.fixture
def tables(monkeypatch):
    """Rewards registered in the test are forgotten after it."""
    import rewards

    for name in ("FOREIGN", "OPTIONS", "REQUIRED", "TYPES"):
        monkeypatch.setattr(rewards, name, dict(getattr(rewards, name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Where coverage looks on, it is told which test it sees (scripts/mutants.py)."""
    if (coverage := sys.modules.get("coverage")) and (running := coverage.Coverage.current()) is not None:
        running.switch_context(item.nodeid)
    return (yield)
