"""scripts/gpu/check.py at tiny size on the CPU: every arm is there, ratios and targets are what the rounds say."""

import json
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import gpu.check
import pytest
from gpu.arms import ARMS, FULL_SIZE, TINY
from gpu.count import count_cell, count_table, flops_of, from_json
from gpu.measure import Clock, Measured
from gpu.report import arm_record, bounds_record, report, target, targets_of

from sdo_cli.bench.cost import Cost
from sdo_cli.bench.memory import Memory
from sdo_cli.estimate import measuring
from sdo_cli.estimate.gpus import find_gpu
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.work import Operation, Work, moving

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu" / "check.py"


def run(*words, **changed):
    """The script in this process: what it says, and its exit code; ``changed`` are names of its own.

    A new Python takes ten seconds to import everything.
    """
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), chdir(ROOT):
        for name, value in changed.items():
            patch.setattr(gpu.check, name, value)
        for name in ("ACCELERATE_USE_CPU", "PYTORCH_CUDA_ALLOC_CONF"):
            # said by the script; taken back afterwards
            patch.setenv(name, "1")
            patch.delenv(name)
        # its time begins with it, not with the tests
        patch.setattr(gpu.check, "BEGUN", time.monotonic())
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        patch.setattr(sys, "path", [*sys.path])
        try:
            gpu.check.main()
        except SystemExit as end:
            return SimpleNamespace(returncode=1, stdout=out.getvalue(), stderr=f"{err.getvalue()}{end}\n")
    return SimpleNamespace(returncode=0, stdout=out.getvalue(), stderr=err.getvalue())


class Counting:
    """In ``Popen``'s place: the script that counts beside the measuring one, in this process."""

    def __init__(self, command, **_):
        assert command[:2] == [sys.executable, str(SCRIPT)]
        self.code = run(*command[2:]).returncode

    def wait(self, timeout):
        return self.code

    def kill(self):
        pass


@pytest.fixture(scope="module")
def done(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("check")
    for kind in ("sd15", "sdxl"):
        (folder / kind).symlink_to(small(kind))
    out = folder / "check.json"
    words = ["--tiny", "--only", "sd", "--only", "sdxl", "--only", "compile", "--folder", folder, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        # how fast this machine is does not matter here
        patch.setattr(measuring, "ENOUGH", {"cpu": 1e-4})
        patch.setattr(measuring, "REPEATS", 1)
        result = run(*words, subprocess=SimpleNamespace(Popen=Counting, DEVNULL=subprocess.DEVNULL))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text()), result.stdout


def test_every_arm_is_measured_and_counted(done):
    record, _ = done
    assert [cell["name"] for cell in record["cells"]] == [cell.name for cell in TINY]
    for cell in record["cells"]:
        assert list(cell["arms"]) == list(ARMS) and cell["left_out"] == {}
        for arm, found in cell["arms"].items():
            assert len(found["seconds"]) == len(found["seconds_by_stage"]) == 2 and found["peak_bytes"] > 0
            assert sum(found["flops"].values()) > 0 and sum(found["bound_seconds"].values()) > 0, arm
    calls = {arm: found["calls"]["no_grad"] for arm, found in record["cells"][0]["arms"].items()}
    assert (calls["SDO"], calls["SDO, pruned rollouts"], calls["full"]) == (4, 1, 0)
    assert "scripts/gpu/check.py" in record["command"] and record["versions"]["torch"] and record["machine"]["threads"]


def test_ratios_are_of_the_same_round(done):
    record, _ = done
    for cell in record["cells"]:
        full = cell["arms"]["full"]["seconds"]
        for found in cell["arms"].values():
            pairs = zip(found["seconds"], full, strict=True)
            assert found["against_full"] == pytest.approx(median(mine / theirs for mine, theirs in pairs))
            assert found["median_seconds"] == median(found["seconds"])


def test_fractions_are_of_what_was_counted_and_measured(done):
    record, _ = done
    products = record["speed"]["products"]["no"]
    found = record["cells"][0]["arms"]["SDO"]
    assert set(found["fraction_by_stage"]) == set(found["flops"]) == {"rollout", "score", "shortcut"}
    for name, fraction in found["fraction_by_stage"].items():
        seconds = median(stages[name] for stages in found["seconds_by_stage"])
        assert fraction == pytest.approx(found["flops"][name] / products / seconds)
    total = sum(found["flops"].values()) / products
    assert found["fraction_of_bound"] == pytest.approx(total / found["median_seconds"])
    # on one graph there are no stages to count
    assert record["cells"][0]["arms"]["full"]["fraction_by_stage"] == {}
    # the estimator's seconds stand beside the measured ones
    estimated = sum(found["estimated_seconds"].values())
    assert found["estimated_over_measured"] == pytest.approx(estimated / found["median_seconds"]) and estimated > 0


def test_counted_work_grows_with_the_batch(small, tmp_path):
    (tmp_path / "sd15").symlink_to(small("sd15"))
    two, one = (count_cell(replace(TINY[0], batch=size), tmp_path)["SDO"]["rollout"] for size in (2, 1))
    assert two.flops == pytest.approx(2 * one.flops)


def test_targets_are_judged_by_the_first_cell(done):
    record, said = done
    arms = record["cells"][0]["arms"]
    values = [item["value"] for item in record["targets"]]
    assert values[0] == arms["SDO"]["against_full"] and values[4] == arms["SDO, pruned rollouts"]["against_full"]
    assert values[1] == arms["SDO"]["peak_bytes"] / arms["full"]["peak_bytes"]
    single = arms["SDO, scored and sent back one by one"]
    assert values[2] == single["peak_bytes"] / arms["full"]["peak_bytes"]
    assert values[3] == arms["SDO"]["fraction_by_stage"]["rollout"]
    for item in record["targets"][:5]:
        better = item["value"] <= item["limit"] if item["way"] == "at most" else item["value"] >= item["limit"]
        assert item["met"] is better
    # the table comes last
    assert said.strip().splitlines()[-1].startswith("| SDO's time compiled")
    for name in ("compile", "channels_last"):
        pairs = zip(record[name]["seconds_on"], record[name]["seconds_off"], strict=True)
        assert record[name]["on_against_off"] == pytest.approx(median(on / off for on, off in pairs))
    assert values[5] == record["compile"]["on_against_off"] and "with channels_last=true" in said


def test_a_target_is_met_at_its_limit_and_unknown_without_a_figure():
    assert target("a", "at most", 0.4, 0.4)["met"] is True and target("a", "at most", 0.4, 0.41)["met"] is False
    assert target("b", "at least", 0.7, 0.69)["met"] is False and target("b", "at least", 0.7, 0.7)["met"] is True
    assert [item["met"] for item in targets_of(None, None)] == [None] * 6


def test_without_full_there_is_no_ratio_but_everything_else():
    cost = Cost(seconds=[2.0, 4.0, 3.0], by_stage=[{"rollout": 1.0}, {"rollout": 2.0}, {"rollout": 2.0}])
    found = arm_record(cost, Memory(5, 5), None)
    assert found["against_full"] is None and found["median_seconds"] == 3.0
    matrix = Operation("matrix", "bf16", 8.0, 0.0)
    # products in fp32 are held against those in fp32
    works = {"rollout": Work({matrix: 1}), "score": Work({replace(matrix, precision="no"): 1}), "optimizer": moving(4)}
    speed = Speed("it", {("matrix", "bf16"): ((1.0, 8.0),), ("matrix", "no"): ((1.0, 4.0),)}, 2.0, 0.0)
    bounds = bounds_record(cost, works, speed)
    assert bounds["bound_seconds"] == {"rollout": 1.0, "score": 2.0, "optimizer": 0.0}
    assert bounds["fraction_of_bound"] == 1.0 and bounds["fraction_by_stage"] == {"rollout": 0.5}
    assert bounds["estimated_over_measured"] == pytest.approx((1 + 2 + 2) / 3)
    # without counts a table all the same
    cell = {"name": "x", "arms": {"SDO": found}, "left_out": {"full": "no time"}}
    record = {"speed": {"name": "it", "products": {"no": 1e12}}, "date": "d", "tests": None, "cells": [cell]}
    text = report({**record, "compile": None, "left_out": ["y: no time"], "targets": targets_of(cell, None)})
    assert "full: no time" in text and "left out: y: no time" in text and "not measured" in text


def test_arms_there_is_no_time_for_are_left_out_from_the_end(monkeypatch):
    import gpu.measure as measuring

    clock, stand = Clock(10), FakeStand()
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock.start + stand.now)
    monkeypatch.setattr(measuring, "measure_here", lambda bench, variant: stand.spend(variant))
    monkeypatch.setattr(measuring, "timed", lambda run, device: (run(), 10.0)[1])

    def iteration(bench, variant, cost, *, step):
        cost.seconds.append(10.0)
        stand.spend(variant)

    monkeypatch.setattr(measuring, "one_iteration", iteration)
    found: Measured = measuring.measure_cell(stand, clock, seconds=150, rounds=9, reporter=Silently())
    # six warm-ups, then one round of five arms; a second would not be over by 150
    assert list(found.arms) == list("abcde") and found.left_out == dict.fromkeys("fgh", "no time")
    assert all(cost.seconds == [10.0] for cost, _ in found.arms.values()) and stand.now == 110


class Silently:
    phase = advance = note = close = lambda *given: None


class FakeStand:
    """Every iteration takes ten seconds."""

    cell = TINY[0]

    def __init__(self):
        self.now, self.arms, self.bench = 0.0, {name: FakeVariant() for name in "abcdefgh"}, FakeBench()

    def spend(self, variant):
        self.now += 10.0
        return Memory(1, 1)


class FakeVariant:
    def checkpointing(self, recipe):
        return "none"


class FakeBench:
    class any_job:
        class family:
            device = None

    class jobs:
        recipe = None

        def __class_getitem__(cls, variant):
            return cls


def test_counting_alone_prints_the_ratios(tmp_path):
    done = run("--count", "--tiny", "--only", "sd", "--out", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr[-2000:]
    counted = from_json(json.loads((tmp_path / "c.json").read_text()))
    assert list(counted) == [TINY[0].name]
    first = counted[TINY[0].name]
    assert count_table(first) in done.stdout and list(first) == list(ARMS)
    assert sum(flops_of(first["SDO"]).values()) < sum(flops_of(first["full"]).values())
    # estimated for a GPU by name, the optimizer too
    speed = find_gpu("4090").speed
    table = count_table(first, speed)
    sdo, full = (sum(work.seconds(speed) for work in first[arm].values()) for arm in ("SDO", "full"))
    assert f"{sdo / full:.3f} |" in table and "optimizer" in first["SDO"]


def test_it_says_in_one_sentence_what_is_missing(tmp_path):
    """Packages, or the GPU."""
    done = run("--out", tmp_path / "c.json")
    assert done.returncode == 1 and done.stderr.strip().startswith("gpu-check: no CUDA GPU here")
    code = f"import sys; sys.argv = ['check.py']; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import gpu.check\n"
    code += "gpu.check.NEEDED = (*gpu.check.NEEDED, 'no_such_package'); gpu.check.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "gpu-check: no_such_package not installed here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--tiny" in done.stdout


def test_full_size_is_what_the_targets_are_about():
    first = FULL_SIZE[0]
    assert (first.kind, first.pixels, first.batch, first.steps, first.precision) == ("sd15", 512, 8, 50, "bf16")
    assert first.computed / first.steps == 0.2


@pytest.mark.slow
def test_a_part_that_fails_costs_that_part(tmp_path):
    """Counting that fails, and a compiler: what was measured is written and said."""
    code = f"""
import sys
sys.argv = ["check.py", "--tiny", "--only", "sd", "--only", "compile", "--rounds", "1"]
sys.argv += ["--out", {str(tmp_path / "c.json")!r}]
sys.path.insert(0, {str(ROOT / "scripts")!r})
import gpu.check, gpu.measure, subprocess
gpu.check._start_counting = lambda given, folder: subprocess.Popen(["false"])
def broken(*given, **how):
    raise RuntimeError("no compiler")
gpu.measure.measure_changed = broken
gpu.check.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["cells"][0]["arms"]["SDO"]["seconds"] and "flops" not in record["cells"][0]["arms"]["SDO"]
    assert [text.split(":")[0] for text in record["left_out"]] == ["compile=none", "channels_last=true"]
    assert "no compiler" in done.stdout and "| SDO " in done.stdout
