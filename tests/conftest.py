import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only wait for each other
# threads of commands that tests start, and of tests that want several, wait as users' do
import sdo_cli  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """small(kind) -> folder, made once."""
    from small_models import make_small

    root, made = tmp_path_factory.mktemp("small"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_small(kind, root)
        return made[kind]

    return folder


@pytest.fixture
def tables(monkeypatch):
    """Rewards registered in the test are forgotten after it."""
    import rewards

    for name in ("FOREIGN", "OPTIONS", "REQUIRED", "TYPES"):
        monkeypatch.setattr(rewards, name, dict(getattr(rewards, name)))
