"""Seconds: what operations are seen to do, what a known speed makes of it, and the table of named GPUs."""

import json

import entry
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdo_cli.doctor.advice import candidates, estimate_recipe
from sdo_cli.doctor.target import find_target
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.cost import META, count
from sdo_cli.estimate.gpus import GPUS, find_gpu
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.work import Operation, Work, moving
from sdo_cli.recipe.load import load_recipe

SMALL = ["validation.num_prompts=4", "train_batch_size=4", "num_inference_steps=4", "guidance_scale=3"]


def operations(run):
    return dict(count(run).work.operations)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device=META, dtype=dtype)


def test_a_product_reads_two_matrices_and_writes_one():
    a, b = empty(3, 5), empty(5, 7)
    assert operations(lambda: a @ b) == {Operation("matrix", "no", 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)): 1}
    half = operations(lambda: a.bfloat16() @ b.bfloat16())
    assert half[Operation("matrix", "bf16", 210, 2 * 71)] == 1


def test_a_convolution_is_known_forward_and_backward():
    x, weight = empty(2, 4, 8, 8).requires_grad_(), empty(6, 4, 3, 3)
    found = operations(lambda: F.conv2d(x, weight, padding=1))
    flops, sizes = 2 * 9 * 4 * 6 * 2 * 64, (2 * 4 * 64, 6 * 4 * 9, 2 * 6 * 64)
    assert found == {Operation("convolution", "no", flops, 4 * sum(sizes)): 1}
    both = operations(lambda: F.conv2d(x, weight, padding=1).sum().backward())
    assert [o.flops for o in both if o.product == "convolution backward"] == [flops]


def test_attention_is_one_operation_that_moves_no_matrix_of_weights():
    q = empty(1, 2, 64, 8)
    (found,) = operations(lambda: F.scaled_dot_product_attention(q, q, q))
    assert found.product == "attention" and found.flops == 2 * 2 * 2 * 64 * 64 * 8
    # queries, keys and values are one tensor here; what is written beside it is a number per query
    assert found.moved == 2 * q.nbytes + 2 * 64 * 4


def test_views_and_reserving_memory_are_free_and_changes_in_place_are_not():
    x, y = empty(10, 10), empty(10, 10)
    assert not operations(lambda: torch.empty_like(x.view(100).t().detach()))
    assert operations(lambda: x + y) == {Operation("", "", 0, 3 * 400): 1}
    assert operations(lambda: x.t().add_(y)) == {Operation("", "", 0, 3 * 400): 1}
    assert operations(lambda: x.copy_(y)) == {Operation("", "", 0, 2 * 400): 1}
    assert operations(lambda: x.zero_()) == {Operation("", "", 0, 400): 1}
    # a row that is expanded is read once
    assert operations(lambda: x[:1].expand(10, 10) + y) == {Operation("", "", 0, 40 + 2 * 400): 1}


def test_a_table_is_read_where_it_is_looked_up():
    with META:
        table = nn.Embedding(50_000, 16)
    (found,) = operations(lambda: table(empty(3, dtype=torch.long)))
    assert found.moved == 2 * 3 * 16 * 4


PRODUCT = Operation("matrix", "bf16", 4e9, 100.0)
SPEED = Speed("test", {("matrix", "bf16"): ((1.0, 1e9),), ("matrix", "no"): ((1.0, 5e8),)}, bandwidth=1e6, launch=1e-3)


def test_work_adds_up_and_multiplies():
    work = Work({PRODUCT: 2}) + moving(1e6, 3) * 0.5 + Work({PRODUCT: 1}) - Work({PRODUCT: 0.5})
    assert work.operations == {PRODUCT: 2.5, Operation("", "", 0.0, 1e6): 1.5}
    assert (work.flops, work.moved, work.launches) == (1e10, 2.5 * 100 + 1.5e6, 4)


def test_seconds_are_those_of_a_hand_calculation():
    # two products of 4 s each, three transfers of 2 s; FLOPs alone take 8 s
    work = Work({PRODUCT: 2}) + moving(2e6, 3)
    assert work.seconds(SPEED) == pytest.approx(14) and work.bound(SPEED) == pytest.approx(8)
    # a product that waits for its bytes
    assert Work({Operation("matrix", "no", 5e8, 3e6): 1}).seconds(SPEED) == pytest.approx(3)
    many = moving(1.0, 1000)
    assert many.seconds(SPEED) == pytest.approx(1.0)
    one_by_one = Speed("test", SPEED.rates, SPEED.bandwidth, SPEED.launch, ahead=False)
    assert many.seconds(one_by_one) == pytest.approx(1.001) and work.seconds(one_by_one) == pytest.approx(14.005)


def test_rates_grow_with_products_and_kinds_not_known_are_those_they_are_made_of():
    curves = {("matrix", "no"): ((1e6, 1e9), (1e8, 1e11)), ("convolution", "no"): ((1.0, 7e9),)}
    speed = Speed("test", curves, 1e9, 0.0, fresh=1e6)
    assert speed.rate("matrix", "no", 1e7) == pytest.approx(1e10)
    assert [speed.rate("matrix", "no", flops) for flops in (1.0, 1e6, 1e8, 1e12)] == [1e9, 1e9, 1e11, 1e11]
    assert speed.rate("convolution backward", "no", 1.0) == 7e9 and speed.rate("attention", "no", 1e8) == 1e11
    assert speed.products == {"no": 1e11}
    assert (speed.bandwidth_of(2**20), speed.bandwidth_of(2**30)) == (1e9, 1e6)


def test_seconds_follow_the_recipe():
    target = find_target(None, "4090")

    def step(*words):
        return estimate_recipe(load_recipe("quickstart", ["rollout={}", *SMALL, *words]), target)

    plain, speed = step(), target.speed
    assert plain.is_known(speed)
    step_seconds = sum(stage.work.seconds(speed) for stage in plain.stages if stage.each_step)
    once = sum(stage.work.seconds(speed) for stage in plain.stages if not stage.each_step)
    assert plain.step_seconds(speed) == pytest.approx(step_seconds)
    assert plain.run_seconds(speed, 10) == pytest.approx(10 * step_seconds + once)
    assert plain.run_bound(speed, 10) < plain.run_seconds(speed, 10)
    longer = step("num_inference_steps=8").step_seconds(speed)
    assert 1.5 * step_seconds < longer < 2.1 * step_seconds
    # every optimizer moves weights, gradients and moments
    (optimizer,) = [stage for stage in step("train=full").stages if stage.name == "optimizer"]
    assert optimizer.work.moved > 7 * 4 * plain.trained and optimizer.flops == 0


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_named_gpu_is_sane(gpu):
    assert find_gpu(gpu.name) is gpu and gpu.source
    assert 8 <= gpu.memory <= 200 and 200 <= gpu.bandwidth <= 8000
    # tensor cores are at least as fast as the others, at most 30 times
    assert gpu.fp32 <= (gpu.tf32 or gpu.fp32) <= gpu.half <= 30 * gpu.fp32
    speed = gpu.speed
    assert not speed.measured and speed.products["fp16"] < 1e12 * gpu.half
    assert ("bf16" in speed.products) is (gpu.name.split()[0] not in ("T4", "V100"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX4090", "RTX 4090"),
        ("a100-80gb", "A100 80GB"),
        ("A100", "A100 40GB"),
        ("h100_sxm", "H100 SXM"),
        ("Tesla T4", "T4"),
        ("a6000", "RTX A6000"),
        ("6000 ada", "RTX 6000 Ada"),
    ],
)
def test_names_are_forgiving(text, name):
    assert find_gpu(text).name == name


@pytest.mark.parametrize("text", ["", "rtx", "L40", "409", "gpu"])
def test_an_unknown_name_lists_the_known_ones(text):
    with pytest.raises(RecipeFault) as caught:
        find_gpu(text)
    assert all(gpu.name in str(caught.value.problems) for gpu in GPUS)


def test_a_gpu_without_bf16_is_advised_fp16():
    t4 = find_target(None, "T4")
    words = [word for change in candidates(load_recipe("quickstart").recipe, "shortcut", t4.half) for word in change]
    assert "mixed_precision=fp16" in words and "mixed_precision=bf16" not in words
    assert find_target("8GB", "T4").memory == 8e9


def doctor(*arguments, cwd):
    return entry.run(["doctor", "--recipe", "quickstart", *SMALL, *arguments], cwd=cwd)


def test_doctor_times_a_named_gpu(tmp_path):
    done = doctor("--gpu", "rtx4090", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("seconds", "fits RTX 4090 (24.0 GB)", " a step, ", "bound by FLOPs alone", "maker's figures × 0.7"):
        assert words in done.stdout
    report = json.loads(doctor("--gpu", "rtx4090", "--json", cwd=tmp_path).stdout)
    found = report["estimate"]
    each = [stage["seconds"] for stage in found["stages"] if stage["each_step"]]
    assert found["seconds_per_step"] == pytest.approx(sum(each)) and min(each) > 0
    assert found["seconds_per_run"] > found["seconds_per_run_by_flops_alone"] > 0
    assert report["device"]["speed"]["measured_here"] is False


def test_doctor_says_when_it_cannot_time(tmp_path):
    wrong = doctor("--gpu", "9090", cwd=tmp_path)
    assert wrong.returncode == 2 and "--gpu 9090: is not among the GPUs sdo knows: T4, " in wrong.stdout + wrong.stderr
    half = doctor("--gpu", "T4", "mixed_precision=bf16", cwd=tmp_path)
    assert half.returncode == 2 and "! driver    a T4 has no bf16" in half.stdout
    assert "set mixed_precision=fp16" in half.stdout and "no estimate of time" in half.stdout
    memory = doctor("--gpu-memory", "12GB", cwd=tmp_path)
    assert memory.returncode == 0 and "no estimate of time: name a GPU (--gpu 4090)" in memory.stdout


def test_doctor_measures_this_machine(tmp_path):
    report = json.loads(doctor("--json", cwd=tmp_path).stdout)
    assert report["device"]["speed"]["measured_here"] is True
    assert set(report["device"]["speed"]["products"]) == {"no"} and report["estimate"]["seconds_per_step"] > 0
