"""Slow: what the quickstart promises, and that the gain is the gradient's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from studies.controls import permuted, run_controls

from sdo_cli.threads import cores

# forty rollouts, as many as steps
ONE_UPDATE = ["rollout={}", "gradient.options={}", "learning_rate=1e-3", "train_batch_size=8"]
ONE_UPDATE += ["lora.layers=attention", "lora.rank=8"]


def test_permuting_leaves_no_sample_its_own_gradient():
    g = torch.arange(8.0)
    for step in range(30):
        moved = permuted(g, step)
        assert sorted(moved.tolist()) == g.tolist() and not (moved == g).any()


@pytest.mark.slow
def test_quickstart_raises_reward_and_judge_on_heldout_prompts(tmp_path):
    folder = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "sdo_cli", "finetune", "--recipe", "quickstart", "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    gains = json.loads(done.stdout)["gains"]
    assert set(gains) == {"clip-embedded", "judge"}
    for gain in gains.values():
        assert gain["prompts"] >= 128
        assert gain["difference"] > 4 * gain["standard_error"]


@pytest.mark.slow
def test_the_gain_is_the_gradients():
    torch.set_num_threads(cores())
    gains = run_controls("quickstart", [*ONE_UPDATE, "max_train_steps=40", "validation.num_prompts=128"])
    for reward in ("clip-embedded", "judge"):
        assert gains["sign flipped"][reward].in_standard_errors < -4
    sdo, moved = gains["sdo"]["clip-embedded"].difference, gains["permuted"]["clip-embedded"].difference
    assert moved.mean < sdo.mean
