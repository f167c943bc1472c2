"""What a GPU could do otherwise than the CPU. Run there by `make gpu-check`, or CUDA_VISIBLE_DEVICES=0 pytest -m gpu.

Everything that has a meaning on the CPU runs there too, so that these tests are alive where there is no GPU.
"""

import json
import subprocess
import sys

import entry
import pytest
import torch
from safetensors.torch import load_file

from sdo_cli.bench.bench_job import new_adapter, open_workbench
from sdo_cli.bench.memory import measure_here
from sdo_cli.bench.nearness import cosine
from sdo_cli.bench.variants import load_variants
from sdo_cli.gradients import run as engines
from sdo_cli.gradients import three_stage

WITHOUT = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SMALL = ["num_inference_steps=3", "train_batch_size=2", "guidance_scale=3", "validation={}"]
CLIP = "rewards=[{name: clip-score, options: {model: embedded}}]"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT])])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    return request.param


@pytest.fixture
def model(device, small):
    """On a GPU the embedded model, on the CPU a smaller one."""
    return [] if device == "cuda" else [f"model={small('sd15')}", CLIP]


def opened(*overrides, rules=("sdo",)):
    """The bench, its adapter moved; variants by name."""
    bench = open_workbench(load_variants("bench", [*SMALL, *overrides], rules))
    new_adapter(bench, seed=0, moved=0.02)
    return bench, {variant.name: variant for variant in bench.jobs}


def gradient(bench, variant, step=0):
    outcomes = bench.gradient(variant, step)
    return bench.flat_gradient(), outcomes[0]


def test_three_stages_are_one_graph(device, model, monkeypatch):
    bench, variants = opened(*model, rules=["sdo:steps_per_sample=2"])
    (variant,) = variants.values()
    staged, outcome = gradient(bench, variant)
    assert outcome.x_N.device.type == device and set(outcome.seconds) == {"rollout", "score", "shortcut"}

    def on_one_graph(path, plan, objective, *, terms, micro, change_g, keep):
        assert micro.rollout is None and change_g is None and not keep
        return engines.one_graph(path, plan, objective, terms=terms)

    monkeypatch.setattr(engines, "three_stage", on_one_graph)
    whole, outcome = gradient(bench, variant)
    assert set(outcome.seconds) == {"forward", "backward"}
    # convolutions of a GPU may take TF32, and choose another algorithm by the batch
    assert cosine(staged, whole) > 0.9999 and float(staged.norm() / whole.norm()) == pytest.approx(1, abs=1e-2)


def test_bf16_is_finite_and_near_fp32(device, model):
    bench, variant = _one(opened(*model))
    exact, _ = gradient(bench, variant)
    half, variant = _one(opened(*model, "mixed_precision=bf16", "reward_precision=bf16"))
    with_the_adapter_of(half, bench)
    rounded, outcome = gradient(half, variant)
    assert outcome.x_N.device.type == device
    assert bool(torch.isfinite(rounded).all()) and cosine(exact, rounded) > 0.97


def with_the_adapter_of(bench, other):
    """Where an adapter's first values are drawn is the libraries' business."""
    with torch.no_grad():
        for mine, theirs in zip(bench.parameters, other.parameters, strict=True):
            mine.copy_(theirs)


def _one(found):
    bench, variants = found
    return bench, next(iter(variants.values()))


def test_memory_does_not_grow_with_the_steps(device, model):
    peaks = {}
    for steps in (2, 6):
        bench, variant = _one(opened(*model, f"num_inference_steps={steps}"))
        # libraries take their workspaces at the first use
        gradient(bench, variant)
        peaks[steps] = measure_here(bench, variant).tensors
    assert bench.any_job.family.device.type == device and peaks[6] < 1.02 * peaks[2]


def test_no_more_memory_than_checkpointed_full(device, model):
    bench, variants = opened(*model, rules=["full", "sdo"])
    assert bench.any_job.family.device.type == device
    for variant in variants.values():
        gradient(bench, variant)
    peaks = {name: measure_here(bench, variant).tensors for name, variant in variants.items()}
    # 1 %: scratch memory of kernels
    assert peaks["sdo"] <= 1.01 * peaks["full"]


def sdo(*words, on, cwd):
    """On a GPU a process of its own, as users have."""
    if on == "cpu":
        return entry.run(words, cwd=cwd)
    command = [sys.executable, "-m", "sdo_cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_run_killed_half_way_goes_on_as_if_it_had_not_been(device, model, tmp_path):
    """Two steps and two more are four, through the command; on a GPU up to the order in which kernels add."""
    few = ["validation.num_prompts=2", "validation.grid_prompts=1", "checkpointing_steps=2", "lr_scheduler=constant"]
    words = ["finetune", "--recipe", "quickstart", "-q", *few, *model, "train_batch_size=2", "num_inference_steps=2"]
    runs = {"whole": ["max_train_steps=4"], "parts": ["max_train_steps=2"]}
    for name, more in runs.items():
        done = sdo(*words, "--out", name, *more, on=device, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    again = sdo(*words, "--out", "parts", "--resume", "max_train_steps=4", on=device, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = {name: load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in runs}
    for key, weights in found["whole"].items():
        assert bool(torch.isfinite(weights).all())
        assert torch.allclose(weights, found["parts"][key], rtol=1e-2, atol=1e-4 if device == "cuda" else 0), key
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.gpu
@WITHOUT
def test_a_gpus_gradient_is_the_cpus(monkeypatch):
    """Noise and plans are drawn on the CPU, so a GPU computes the same step."""
    bench, variant = _one(opened())
    there, _ = gradient(bench, variant)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    other, variant = _one(opened())
    with_the_adapter_of(other, bench)
    here, _ = gradient(other, variant)
    assert cosine(here, there) > 0.999 and float(here.norm() / there.norm()) == pytest.approx(1, abs=2e-2)


@pytest.mark.gpu
@WITHOUT
def test_a_rollout_never_waits_for_the_gpu(monkeypatch):
    """The host runs ahead of the device: no value is read back, nothing is copied in a way that waits."""
    bench, variant = _one(opened())
    gradient(bench, variant)
    rollout, walked = three_stage.rollout, []

    def watched(*arguments, **options):
        torch.cuda.set_sync_debug_mode("error")
        try:
            walked.append(rollout(*arguments, **options))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return walked[-1]

    monkeypatch.setattr(three_stage, "rollout", watched)
    gradient(bench, variant, step=1)
    assert len(walked) == 1
