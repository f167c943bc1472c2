"""The bench: counts against torch's counter, statistics against known cases, the command through its entry point."""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import entry
import forked
import pytest
import torch
from PIL import Image

from sdo_cli.bench import cost, memory
from sdo_cli.bench.bench_job import new_adapter, open_workbench
from sdo_cli.bench.cost import measure_cost
from sdo_cli.bench.memory import measure_here, measure_memory, peak_of_tensors
from sdo_cli.bench.nearness import _compare, draw_plan, measure_nearness
from sdo_cli.bench.parts import counts, make_parts, total, without_recomputation
from sdo_cli.bench.run import distinct
from sdo_cli.bench.training import affordable_steps, compare_training
from sdo_cli.bench.variants import STANDARD_RULES, load_variants, parse_variant
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.flops import count_flops
from sdo_cli.gradients.rules import RULES
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.progress import Silent
from sdo_cli.training.job import plan_step

SMALL = ["num_inference_steps=4", "train_batch_size=2", "guidance_scale=3", "validation.num_prompts=4"]
FEW = ("full:checkpointing=none", "draft-k:k=1", "refl", "sdo", "sdo:step_choice=last", "sdo:step_choice=per-batch")


def names_of(variants):
    return {variant.name: variant for variant in variants}


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Parts timed once, means over few plans: no figure is for anybody to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "PART_SECONDS", 0.0)
        patch.setattr(cost, "PLANS", 16)
        yield


@pytest.fixture(scope="module")
def words(small):
    """The small model and a reward that is no network: counting FLOPs takes its time by the operation."""
    return [*SMALL, f"model={small('sd15')}", "rewards=[colorfulness]", "max_train_steps=2", "learning_rate=1e-2"]


@pytest.fixture(scope="module")
def bench(words):
    """Every standard rule, four steps; one of SDO's with its blocks recomputed."""
    names = [name.replace("k=5", "k=3") for name in STANDARD_RULES if "steps_per_sample=4" not in name]
    loaded = load_variants("bench", words, [*names, "sdo:step_choice=last"])
    loaded |= load_variants("bench", [*words, "gradient_checkpointing=true"], ["sdo:step_choice=first"])
    found = open_workbench(loaded)
    new_adapter(found, seed=0, moved=0.02)
    return found


def test_every_rule_for_weights_is_in_the_standard_bench():
    assert {parse_variant(name).rule for name in STANDARD_RULES} == {
        n for n, info in RULES.items() if not info.latents_only
    }


def test_flops_put_together_from_parts_are_what_the_counter_says(bench, table):
    """Where only the choice of the live call differs, the table's count of one speaks for all."""
    parts, same = table.part_flops, ("sdo:step_choice=weight-proportional", "sdo:step_choice=late-biased")
    for variant, job in bench.jobs.items():
        plan = plan_step(job, 0)
        counted = table.variants.get(names_of(bench.jobs)["sdo"] if variant.name in same else variant)
        if counted is None:
            measured = count_flops(lambda v=variant, p=plan: bench.gradient(v, 0, plan=p))
            bench.flat_gradient()
        else:
            measured = counted.flops
        recomputed = variant.checkpointing(job.recipe)
        count = counts(job, plan, recomputed)
        assert total(count, parts) == pytest.approx(measured, rel=5e-3), variant.name
        floor = total(without_recomputation(count), parts)
        again = recomputed == "blocks" or (recomputed == "calls" and not plan.is_one_step_deep())
        assert (floor < 0.97 * measured) if again else floor == pytest.approx(measured, rel=5e-3), variant.name


@pytest.fixture(scope="module")
def few(bench):
    return load_and_pick(bench, FEW)


@pytest.fixture(scope="module")
def table(few):
    return measure_cost(few, rounds=1, reporter=Silent())


def test_counts_follow_slices_and_the_regulariser(bench):
    """Two slices of the global batch cost twice one; kl_weight asks the base network once per live call."""
    variant = names_of(bench.jobs)["full:checkpointing=none"]
    job = bench.jobs[variant]
    once = counts(job, plan_step(job, 0), "none")
    double = replace(job, recipe=replace(job.recipe, gradient_accumulation_steps=2))
    assert counts(double, plan_step(double, 0), "none") == {name: 2 * number for name, number in once.items()}
    kept = replace(job, recipe=replace(job.recipe, kl_weight=0.1))
    assert counts(kept, plan_step(kept, 0), "none")["call"] == 4 and "call" not in once
    measured = {}
    for name, other in (("plain", job), ("kept", kept)):
        one = type(bench)({variant: other}, None, bench.order)
        measured[name] = count_flops(lambda one=one: one.gradient(variant, 0))
        bench.flat_gradient()
    call = count_flops(make_parts(bench).run["call"])
    # the base network has no LoRA to multiply with
    assert measured["kept"] - measured["plain"] == pytest.approx(4 * call, rel=0.05)


def test_calls_are_what_the_rules_promise(table):
    calls = {variant.name: cost.calls for variant, cost in table.variants.items()}
    assert calls["full:checkpointing=none"] == {"no_grad": 0.0, "grad": 4.0}
    assert calls["sdo"] == calls["draft-k:k=1"] == {"no_grad": 4.0, "grad": 1.0}
    assert calls["refl"] == {"no_grad": 4.0, "grad": 1.0}
    assert all(len(cost.seconds) == len(cost.bare_seconds) == 1 for cost in table.variants.values())
    stages = {variant.name: set(cost.by_stage[0]) for variant, cost in table.variants.items()}
    assert stages["sdo"] == {"rollout", "score", "shortcut"} and stages["full:checkpointing=none"] == {
        "forward",
        "backward",
    }


def load_and_pick(bench, names):
    picked = {v: job for v, job in bench.jobs.items() if v.name in names}
    assert len(picked) == len(names)
    return type(bench)(picked, bench.validation, bench.order)


def test_nearness_of_full_and_of_the_last_step(few):
    by_name = names_of(few.jobs)
    found = measure_nearness(few, by_name["full:checkpointing=none"], batches=2, draws=4, reporter=Silent())
    full, last, draft = (found[by_name[n]] for n in ("full:checkpointing=none", "sdo:step_choice=last", "draft-k:k=1"))
    assert full.cosine.mean == pytest.approx(1) and full.error == 0 and full.draws == 1
    # last-step SDO is DRaFT-1, and neither has chance in it
    assert last.cosine.mean == pytest.approx(draft.cosine.mean, rel=1e-6) and last.variance == draft.variance == 0
    assert found[by_name["sdo"]].draws == 4 and found[by_name["sdo"]].variance > 0
    assert 0 < draft.cosine.mean < 0.999


def test_variance_and_error_of_known_draws():
    generator = torch.Generator().manual_seed(0)
    truth, bias = torch.zeros(4000, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    truth[0], bias[1] = 2.0, 1.0
    noise = torch.randn(50, 4000, generator=generator, dtype=torch.float64) * (3 / 4000) ** 0.5
    single, of_mean, spread, size, error = _compare(truth + bias + noise, truth)
    # |E g|² = 5, E|g - E g|² = 3, |E g - full|² = 1, |full|² = 4
    assert spread == pytest.approx(3, rel=0.05) and size == pytest.approx(5, rel=0.05)
    assert error == pytest.approx((3 + 1) / 4, rel=0.05)
    assert single == pytest.approx(2 / 8**0.5, rel=0.05) and of_mean == pytest.approx(2 / 5**0.5, rel=0.02)


def test_plans_of_the_bench_are_not_those_of_training(bench):
    variant = names_of(bench.jobs)["sdo"]
    job = bench.jobs[variant]
    drawn = [draw_plan(job, d).live.long().argmax(0).tolist() for d in range(12)]
    trained = [plan_step(job, d).live.long().argmax(0).tolist() for d in range(12)]
    assert drawn != trained and len({tuple(d) for d in drawn}) > 3


def test_steps_stay_within_the_budget(few, table):
    by_name = names_of(few.jobs)
    budget = 5 * table.variants[by_name["sdo"]].mean_flops
    afford = {name: affordable_steps(few.jobs[v], v, table, budget) for name, v in by_name.items()}
    assert afford["sdo"][0] == 5 and afford["sdo"][1] == pytest.approx(budget)
    assert afford["full:checkpointing=none"][0] < 5 <= afford["refl"][0]
    assert all(spent <= budget for _, spent in afford.values())


def test_training_starts_every_rule_from_the_same_adapter(bench, table):
    few = load_and_pick(bench, ("draft-k:k=1", "sdo:step_choice=last", "sdo"))
    *_, result = compare_training(few, table, list(few.jobs), iterations=2, seeds=2, reporter=Silent())
    by_name = {variant.name: rule for variant, rule in result.rules.items()}
    same, other = by_name["draft-k:k=1"], by_name["sdo"]
    # the same gradient from the same adapter, noise and prompts: the same model after it
    for a, b in zip(same.runs, by_name["sdo:step_choice=last"].runs, strict=True):
        assert torch.allclose(a.scores["judge"], b.scores["judge"], atol=1e-5) and a.steps == b.steps == 2
    assert not torch.allclose(same.runs[0].scores["judge"], other.runs[0].scores["judge"], atol=1e-5)
    assert same.gains["judge"].difference.n == 4 and len(same.by_seed["colorfulness"]) == 2
    assert same.by_seed["colorfulness"][0] != same.by_seed["colorfulness"][1]


def test_budget_too_small_for_a_rule_is_refused(bench, table):
    few = load_and_pick(bench, ("full:checkpointing=none", "sdo"))
    with pytest.raises(RecipeFault, match="full:checkpointing=none cannot afford one step"):
        list(compare_training(few, table, list(few.jobs), iterations=1, seeds=1, reporter=Silent()))


def test_peak_of_tensors_counts_bytes():
    def run():
        a = torch.zeros(1000, dtype=torch.float64)
        b = torch.zeros(500, dtype=torch.float64)
        del a
        c = torch.zeros(250, dtype=torch.float64)
        return b, c

    assert peak_of_tensors(run) == 12000


def test_sdo_memory_does_not_grow_with_steps_and_full_does(bench):
    found = {}
    for steps in (2, 8):
        both = load_and_pick(bench, (*FEW[:1], "sdo"))
        longer = {v: replace(job.recipe, num_inference_steps=steps) for v, job in both.jobs.items()}
        both.jobs = {v: replace(job, recipe=longer[v]) for v, job in both.jobs.items()}
        for variant in both.jobs:
            # memory that other tests gave back to the allocator would be taken again unseen
            ctypes.CDLL(None).malloc_trim(0)
            found[variant.name, steps] = measure_here(both, variant)
    assert found["sdo", 8].tensors < 1.05 * found["sdo", 2].tensors
    assert found["full:checkpointing=none", 8].tensors > 2 * found["full:checkpointing=none", 2].tensors
    # the process's resident memory sees it too
    assert found["full:checkpointing=none", 8].peak > 2 * found["sdo", 8].peak


def test_a_rule_that_runs_out_of_memory_is_left_out(bench, monkeypatch):
    notes = []

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    tight = load_and_pick(bench, ("full:checkpointing=none", "sdo"))
    rollout = type(tight).rollout

    def short_of_memory(self, variant, number):
        if variant.rule == "full":
            raise torch.OutOfMemoryError
        return rollout(self, variant, number)

    monkeypatch.setattr(type(tight), "rollout", short_of_memory)
    table = measure_cost(tight, rounds=0, reporter=Noting())
    assert [v.name for v in table.variants] == [v.name for v in tight.jobs] == ["sdo"]
    assert notes == [
        "full:checkpointing=none does not fit into the GPU's memory: left out; lower train_batch_size to include it"
    ]


def test_training_is_held_against_the_model_without_an_adapter(bench, table, small):
    """The other parts move the adapter; the baseline of a gain is the plain model."""
    last = load_and_pick(bench, ("sdo",))
    new_adapter(last, seed=0, moved=0.5)
    comparison = next(compare_training(last, table, list(last.jobs), iterations=1, seeds=1, reporter=Silent()))
    plain = bench.validation.measure(load_family(ModelSource(str(small("sd15")))), Silent())
    assert torch.allclose(comparison.before["judge"], plain["judge"], atol=1e-4)


def test_a_rule_whose_memory_cannot_be_measured_is_noted_and_left_out(few, monkeypatch):
    """A child process that dies, for example of memory, costs one figure and not the bench."""
    notes = []

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    dying = {variant: None for variant in few.jobs if variant.name == "sdo"}
    monkeypatch.setattr("sdo_cli.bench.memory.sys.executable", "/bin/false")
    assert measure_memory(few, dying, "bench", SMALL, Noting()) == {}
    assert "measuring the memory of sdo ended with code 1" in notes[0] and "train_batch_size" in notes[0]


def test_variants_that_only_recompute_train_once():
    variants = [parse_variant(name) for name in STANDARD_RULES]
    kept = distinct(variants)
    assert len({v.plan_name for v in variants}) == len(kept) and kept[0].name == "full:checkpointing=none"


def test_micro_batches_are_no_other_gradient():
    variant = parse_variant("sdo:score_micro_batch=1,steps_per_sample=2,shortcut_micro_batch=1")
    assert {"gradient.score_micro_batch=1", "gradient.options.steps_per_sample=2"} < set(variant.overrides)
    assert variant.plan_name == "sdo:steps_per_sample=2"
    assert len(distinct([parse_variant("sdo"), parse_variant("sdo:score_micro_batch=1")])) == 1


def command(*arguments, cwd=None):
    return entry.run(["bench", *arguments], cwd=cwd, timeout=900)


def test_the_whole_command(tmp_path, words, monkeypatch):
    """Memory is measured in a process of its own: of one rule, and one that need not import everything anew."""

    def child(words, **options):
        if '"variant": "sdo"' in words[-1]:
            assert words[:3] == [sys.executable, "-m", "sdo_cli.bench.memory"] and options["capture_output"]
            return forked.run(words[3:], call="sdo_cli.bench.memory:main")
        return subprocess.CompletedProcess(words, 0, json.dumps({"peak": 1, "tensors": 1}), "")

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=child))
    # a uniform AlignProp of two steps draws one graph and the last step alone, which needs none
    rules = ["--rule", "full:checkpointing=blocks", "--rule", "sdo", "--rule", "alignprop:truncation=uniform"]
    few = ["--rounds", "4", "--batches", "1", "--draws", "2", "--iterations", "2", "--seeds", "1"]
    done = command("--out", "b", *rules, *few, *words, "num_inference_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"bench.json", "cost.png", "nearness.png", "training.png", "training_scores.json"}
    for name in (name for name in names if name.endswith(".png")):
        assert Image.open(tmp_path / "b" / name).size[0] > 500
    record = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert record["machine"]["threads"] >= 1 and record["versions"]["torch"]
    sdo = record["cost"]["rules"]["sdo"]
    assert sdo["flops_against_full"]["blocks"] < 1 and sdo["memory"]["tensors"] > 0
    assert record["nearness"]["full"]["cosine"]["mean"] == pytest.approx(1)
    assert record["training"]["rules"]["sdo"]["steps"] == [2]
    assert record["training"]["rules"]["sdo"]["gains"]["judge"]["difference"]["n"] == 4
    assert "| sdo " in done.stdout and "timing: 15/15" in done.stderr
    again = command("--out", "b", *rules, *SMALL, cwd=tmp_path)
    assert again.returncode == 2 and "holds a bench" in again.stderr


WRONG = {
    "nothing held out": (["--part", "training", "validation={}"], "the training part needs held-out prompts"),
    "unknown rule": (["--part", "cost", "--rule", "sod"], "unknown gradient rule 'sod'; did you mean sdo?"),
    "unknown option": (["--part", "cost", "--rule", "sdo:steps=2"], "recipe with --rule sdo:steps=2:\n  argument"),
    "not an option": (["--part", "cost", "--rule", "sdo:2"], "'2' is not option=value"),
    "twice": (["--part", "cost", "--rule", "sdo", "--rule", "sdo"], "is in the list twice"),
    "for latents": (["--part", "cost", "--rule", "sdo-0"], "sdo-0 has no gradient for weights"),
    "nothing to compare with": (["--rule", "sdo", "--part", "nearness"], "--part nearness compares with full"),
    "no such part": (["--part", "speed"], "there is no such part; choose from cost, nearness, training"),
    "no rounds": (["--rounds", "0"], "--rounds: must be at least 1, not 0"),
    "no checkpointing there": (["--part", "cost", "--rule", "sdo:checkpointing=none"], "is for rules that chain steps"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_input_is_told_at_once(kind, tmp_path):
    arguments, expected = WRONG[kind]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
