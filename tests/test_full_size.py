"""Full-size models with random weights, one SDO step on the CPU, and the estimate of its memory. Minutes long."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from sdo_cli.threads import cores

ROOT = Path(__file__).parent.parent
STEP = ROOT / "scripts" / "full_size_step.py"


def run(*words):
    # attention and convolutions of this size want every core
    environment = os.environ | {"OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1"}
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15"])
def test_a_skip_plan_on_its_network(kind, tmp_path):
    """256 pixels, three DDIM steps with guidance: a plan that skips nothing draws the same image."""
    run(STEP, "--kind", kind, "--folder", tmp_path, "--only-make")
    (tmp_path / "prompts.txt").write_text("a lighthouse in thick fog\na red bus\n")
    drawn = ["--model", tmp_path / kind, "--precision", "bf16", "--height", "256", "--width", "256"]
    for ratio in ("0", "0.6"):
        words = ["-p", tmp_path / "prompts.txt", "--method", "uniform", "--ratio", ratio, "--live-calls", "1"]
        run("-m", "sdo_cli", "prune", *drawn, *words, "--steps", "3", "--num-prompts", "0", "--out", tmp_path / ratio)
    plans = {"plain": ["--steps", "3"]}
    plans |= {r: ["--skip-plan", tmp_path / r / f"plan-{float(r):.2f}.json"] for r in ("0", "0.6")}
    for name, words in plans.items():
        run("-m", "sdo_cli", "sample", "a red bus", *drawn, *words, "--out", tmp_path / f"drawn-{name}")
    images = {name: (tmp_path / f"drawn-{name}/00000.png").read_bytes() for name in plans}
    pixels = {name: Image.open(BytesIO(data)).tobytes() for name, data in images.items()}
    assert pixels["0"] == pixels["plain"] != pixels["0.6"]
    calls = json.loads((tmp_path / "0.6/plan-0.60.json").read_text())["runs"]
    assert [set(row) for row in calls] == [{"1"}, {"0"}, {"0"}]


SDXL = ("model=stabilityai/stable-diffusion-xl-base-1.0", "variant=fp16", "height=1024", "width=1024")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "gpu"),
    [
        (("low-memory", "height=512", "width=512"), "12GB"),
        (("low-memory", *SDXL), "24GB"),
        (("low-memory-sdxl",), "12GB"),
    ],
)
def test_low_memory_fits(words, gpu):
    """By the estimate, as no weights are here: doctor's exit code speaks of weights and disk too."""
    done = subprocess.run(
        [sys.executable, "-m", "sdo_cli", "doctor", "--recipe", *words, "--gpu-memory", gpu, "--json"],
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout)
    assert told["fits"] is True and told["estimate"]["needed"] <= told["device"]["memory"]
    assert {stage["stage"] for stage in told["estimate"]["stages"]} >= {"rollout", "score", "shortcut"}
