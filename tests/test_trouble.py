"""What goes wrong around a run: memory, disk, folders, weights. One clear end, and the last checkpoint intact."""

import json
import os
import re
import resource
import shutil
import time

import entry
import forked
import pytest
import torch
from test_checkpoints import STEPS, TINY, UNMEASURED, command, run

from sdo_cli.cli.app import said
from sdo_cli.cli.finetune import out_of_memory
from sdo_cli.errors import EnvironmentFault
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.checkpoint import newest


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_ends_with_advice_that_fits_the_recipe(fault):
    """The same estimator as sdo doctor's; each override it names is one of this recipe."""
    loaded = load_recipe("quickstart", ["train_batch_size=16"])
    found = out_of_memory(fault, loaded)
    assert isinstance(found, EnvironmentFault) and "has not enough memory for this recipe" in found.message
    assert "try with " in found.remedy and "sdo doctor --recipe quickstart" in found.remedy
    words = found.remedy.splitlines()[0].removeprefix("try with ").split()
    assert words and load_recipe("quickstart", ["train_batch_size=16", *words])


def test_what_is_not_memory_is_left_alone():
    assert out_of_memory(RuntimeError("shapes differ"), load_recipe("quickstart", [])) is None


def test_a_run_without_memory_says_so_once(tmp_path):
    """A real allocation that is refused, in the middle of training."""
    (tmp_path / "greedy.py").write_text(
        """
import torch
from rewards import reward

@reward("greedy", summary="wants more than there is", licence="none needed")
class Greedy:
    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        # the first looks for a gradient
        if self.calls == 4:
            torch.empty(2**50, dtype=torch.float32)
        return images.flatten(1).mean(1)
"""
    )
    words = [*TINY, *UNMEASURED, "rollout={}", "--plugin", str(tmp_path / "greedy.py"), "rewards=[greedy]"]
    done = entry.run(["finetune", "--recipe", "quickstart", "--out", str(tmp_path / "run"), *words])
    assert done.returncode == 2 and done.stderr.count("has not enough memory for this recipe") == 1, done.stderr
    assert "try with " in done.stderr and "Traceback" not in done.stderr
    assert newest(tmp_path / "run")[0].step == 2
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


CONSTANT = [*UNMEASURED, "lr_scheduler=constant"]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """Stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    assert run(folder, "-q", "max_train_steps=2", *CONSTANT).returncode == 0
    return folder


def full_disk():
    """`sdo` that may write no file of more than 100 kB, as on a disk that fills up: a checkpoint has more."""
    import signal

    from sdo_cli.cli.app import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    main()


def test_a_full_disk_leaves_the_last_checkpoint(halfway, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    process = forked.Forked(command(folder, "--resume", *CONSTANT), call="test_trouble:full_disk")
    _, text = process.communicate(120)
    assert process.returncode == 2 and "free disk space" in text and "fault of sdo" not in text, text
    found, damaged = newest(folder)
    assert found.step == 2 and damaged == []
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    again = run(folder, "--resume", *CONSTANT)
    assert again.returncode == 0 and "resumed from" in again.stderr, again.stderr


@pytest.mark.parametrize("fault", ["I/O error: No space left on device (os error 28)", "Quota exceeded"])
def test_what_libraries_make_of_a_full_disk_is_no_fault_of_sdo(fault):
    text, remedy, code = said(RuntimeError(fault))
    assert code == 2 and "free disk space" in remedy and fault in text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    started = time.monotonic()
    done = run(tmp_path / "file" / "run")
    assert done.returncode == 2 and "fault of sdo" not in done.stderr and str(tmp_path / "file") in done.stderr
    assert time.monotonic() - started < 60


FOLDERS = {
    "finetune": ["finetune", "--recipe", "quickstart"],
    "sample": ["sample", "a tiger"],
    "optimize": ["optimize", "--prompt", "a tiger", "--objective", "clip-score"],
    "prune": ["prune", "--prompts", "emoji-eval", "--calls", "5", "--method", "schedule"],
    "eval": ["eval", "--prompts", "emoji-eval"],
    "bench": ["bench", "--part", "cost"],
    "report": ["report", "there"],
    "compare": ["compare", "there", "there"],
    "export": ["export", "there"],
}


# root may write anywhere
PLACES = [("sample", "file"), ("bench", "file"), *([("sample", "locked/deep")] if os.geteuid() else [])]


@pytest.mark.parametrize("name, place", [*((name, "file/deep") for name in FOLDERS), *PLACES])
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, name, place):
    """Not when it is done and lost: the first sentence, and nothing was drawn for it."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "there").mkdir()
    (tmp_path / "locked").mkdir(mode=0o555)
    done = forked.run([*FOLDERS[name], "--out", place], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"--out {place}: " in done.stderr and not done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "of 20 steps" not in done.stderr
    assert (tmp_path / "file").read_text() == "no folder"


def test_weights_that_vanished_before_a_resume(small, tmp_path):
    """The model's folder is gone: said before anything is touched; with it back the run goes on."""
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(small("sd15"), model)
    words = [*TINY, *CONSTANT, f"model={model}", "rewards=[colorfulness]"]
    words += ["prompts={lines: [a cat, a dog]}", "guidance_scale=3"]
    start = ["finetune", "--recipe", "quickstart", "--out", str(folder), "-q"]
    done = entry.run([*start, *words, "max_train_steps=2"])
    assert done.returncode == 0, done.stderr
    model.rename(tmp_path / "elsewhere")
    done = entry.run([*start, *words, "--resume"])
    assert done.returncode == 2 and str(model) in done.stderr and "no such path" in done.stderr
    assert newest(folder)[0].step == 2
    (tmp_path / "elsewhere").rename(model)
    done = entry.run([*start, *words, "--resume"])
    assert done.returncode == 0, done.stderr
    assert newest(folder)[0].step == STEPS


@pytest.mark.skipif(os.environ.get("WORLD_SIZE") is not None, reason="one process")
def test_an_evaluation_stopped_by_a_signal_names_the_command_that_goes_on(tmp_path):
    """Without --out the folder has the time in its name: the same command alone would begin another."""
    import signal

    words = ["eval", "--prompts", "emoji-eval", "--limit", "40", "--steps", "4", "--batch-size", "2", "--json"]
    process = forked.Forked(words, cwd=tmp_path)
    for line in process.stderr:
        if '"images", "done": 4' in line:
            break
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(60)
    assert process.returncode == 75 and "stopped (SIGTERM)" in text
    (folder,) = (tmp_path / "evals").iterdir()
    assert re.match(r"go on with: \S*sdo eval", text.splitlines()[-1].strip()) and str(folder.name) in text
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    drawn = len(list((folder / "base").glob("*.png")))
    assert 0 < drawn < 40
