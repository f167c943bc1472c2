"""Full-size models with random weights, one SDO step on the CPU, and the estimate of its memory. Minutes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = ROOT / "scripts" / "full_size_step.py"


def run(*words):
    # attention and convolutions of this size want every core
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_one_step_and_its_memory(kind, tmp_path):
    """Weights in bf16, 256 pixels, two DDIM steps with guidance, LoRA, CLIP ViT-L/14 as the reward; within 24 GB."""
    run(STEP, "--kind", kind, "--folder", tmp_path, "--only-make")
    measured = json.loads(run(STEP, "--kind", kind, "--folder", tmp_path).splitlines()[-1])
    assert 0 < measured["grad_norm"] < float("inf") and measured["moved"] > 0
    assert measured["peak"] < 24e9
    told = run("-m", "sdo_cli", "doctor", "--recipe", tmp_path / f"{kind}.yaml", "--json")
    estimate = json.loads(told)["estimate"]["peak_of_tensors"]
    assert estimate == pytest.approx(measured["peak"], rel=0.15)
