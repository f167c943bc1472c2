"""The bench of rules with rollouts of their own: fewer steps, or a skip plan."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import entry
import pytest
import torch
from test_bench import quick_figures  # noqa: F401
from test_fast_rollouts import fast_lora

from sdo_cli.bench import memory
from sdo_cli.bench.bench_job import new_adapter, open_workbench
from sdo_cli.bench.cost import measure_cost
from sdo_cli.bench.nearness import measure_nearness
from sdo_cli.bench.parts import counts, make_parts, total
from sdo_cli.bench.record import full_costs
from sdo_cli.bench.run import distinct
from sdo_cli.bench.training import compare_training
from sdo_cli.bench.variants import load_variants, parse_variant, plain_full
from sdo_cli.drawing.pruned import made_for, wiring_of
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.flops import count_flops
from sdo_cli.progress import Silent
from sdo_cli.prune.baselines import every
from sdo_cli.recipe.load import load_recipe
from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.training.job import plan_step
from sdo_cli.training.prepare import prepare

SMALL = ["num_inference_steps=6", "train_batch_size=2", "guidance_scale=3", "validation.num_prompts=4"]


@pytest.fixture(scope="module")
def words(small):
    return [*SMALL, f"model={small('sd15')}", "rewards=[colorfulness]", "max_train_steps=2"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory, words, small):
    """Two whole calls of six; one plan that leaves inner blocks out too; a few-step LoRA. By name, as paths."""
    folder = tmp_path_factory.mktemp("plans")
    job, _ = prepare(load_recipe("bench", words))
    wiring = wiring_of(job.family, "blocks", job.embed(job.prompts[:1]))
    made = made_for(job.family, job.draw_settings)
    whole = every(6, 2)[:, None].expand(6, len(wiring.units)).clone()
    inner = torch.ones_like(whole)
    inner[[1, 2, 4], 1:4] = False
    for name, runs in {"whole": whole, "inner": inner}.items():
        SkipPlan(made, "blocks", wiring, runs).save(folder / f"{name}.json")
    lora = fast_lora(small("sd15"), folder / "fast")
    return {name: folder / f"{name}.json" for name in ("whole", "inner")} | {"fast": lora}


@pytest.fixture(scope="module")
def arms(plans):
    return {
        "full": "full",
        "sdo": "sdo",
        "whole": f"sdo:rollout.skip_plan={plans['whole']}",
        "two": f"sdo:steps_per_sample=2,rollout.skip_plan={plans['whole']}",
        "again": f"sdo:rollout.skip_plan={plans['whole']},rollout.estimator=whole",
        "refl": f"refl:rollout.skip_plan={plans['inner']},rollout.estimator=whole",
        "inner": f"sdo:rollout.skip_plan={plans['inner']}",
        "fewer": "sdo:rollout.num_inference_steps=3",
        "full, fewer": "full:rollout.num_inference_steps=3",
        "fast": f"sdo:rollout.lora={plans['fast']},rollout.solver=lcm,rollout.num_inference_steps=2",
    }


@pytest.fixture(scope="module")
def bench(arms, words):
    found = open_workbench(load_variants("bench", words, arms.values()))
    new_adapter(found, seed=0, moved=0.02)
    return found


def picked(bench, arms, *names):
    jobs = {v: job for v, job in bench.jobs.items() if v.name in [arms[name] for name in names]}
    assert len(jobs) == len(names)
    return type(bench)(jobs, bench.validation, bench.order)


def test_flops_of_cheap_rollouts_are_what_the_counter_says(bench, arms):
    parts = {name: count_flops(run) for name, run in make_parts(bench).run.items()}
    names = {text: name for name, text in arms.items()}
    found = {}
    for variant, job in bench.jobs.items():
        plan = plan_step(job, 0)
        measured = count_flops(lambda v=variant, p=plan: bench.gradient(v, 0, plan=p))
        bench.flat_gradient()
        predicted = total(counts(job, plan, variant.checkpointing(job.recipe)), parts)
        # a live call's backward pass is taken to shrink with what is left out as its forward does
        tolerance = 0.02 if names[variant.name] == "inner" else 5e-3
        assert predicted == pytest.approx(measured, rel=tolerance), variant.name
        found[names[variant.name]] = measured
    # two calls without guidance, and what the LoRA itself computes
    assert parts["call"] < found["fast"] - (found["sdo"] - 6 * parts["call"]) < 1.5 * parts["call"]
    assert found["two"] > found["whole"] and found["fewer"] < found["sdo"] and found["full, fewer"] < found["full"]
    # four of six calls are not made
    assert found["sdo"] - found["whole"] == pytest.approx(4 * parts["call"], rel=5e-3)


def test_calls_are_those_of_the_arm_and_blocks_are_recomputed_for_it(arms, bench, words):
    table = measure_cost(picked(bench, arms, "full", "sdo", "whole", "fewer", "fast"), rounds=1, reporter=Silent())
    calls = {variant.name: cost.calls["no_grad"] for variant, cost in table.variants.items()}
    assert [calls[arms[name]] for name in ("full", "sdo", "whole", "fewer", "fast")] == [0, 6, 2, 3, 2]
    recomputing = open_workbench(load_variants("bench", [*words, "gradient_checkpointing=true"], [arms["whole"]]))
    new_adapter(recomputing, seed=0, moved=0.02)
    (variant,) = recomputing.jobs
    assert recomputing.any_job.rollouts is not None
    recomputing.gradient(variant, 0)
    mine = recomputing.flat_gradient()
    assert recomputing.any_job.family.denoiser.is_gradient_checkpointing
    same = next(v for v in bench.jobs if v.name == variant.name)
    bench.gradient(same, 0)
    assert torch.allclose(mine, bench.flat_gradient(), rtol=1e-3, atol=1e-6)


def test_arms_are_kept_apart_and_ratios_are_against_full_rollouts(arms, bench):
    variants = [parse_variant(text) for text in arms.values()]
    assert len(distinct(variants)) == len(variants)
    assert plain_full([arms["full, fewer"], arms["full"]]) == "full" and plain_full([arms["full, fewer"]]) is None
    table = measure_cost(picked(bench, arms, "full, fewer", "full"), rounds=0, reporter=Silent())
    (against,) = full_costs(table).values()
    assert against is next(cost for variant, cost in table.variants.items() if variant.name == "full")


def test_nearness_and_training_take_them(arms, bench):
    few = picked(bench, arms, "full", "sdo", "whole", "fewer", "fast")
    by_name = {variant.name: variant for variant in few.jobs}
    near = measure_nearness(few, by_name["full"], batches=1, draws=2, reporter=Silent())
    assert all(-1 <= near[by_name[arms[name]]].cosine.mean < 1 for name in ("whole", "fewer", "fast"))
    assert near[by_name["sdo"]].cosine.mean != near[by_name[arms["whole"]]].cosine.mean
    few = picked(bench, arms, "sdo", "whole", "fast")
    table = measure_cost(few, rounds=0, reporter=Silent())
    *_, result = compare_training(few, table, list(few.jobs), iterations=2, seeds=1, reporter=Silent())
    steps = {variant.name: rule.runs[0].steps for variant, rule in result.rules.items()}
    # cheaper rollouts afford more steps of the same budget
    assert steps["sdo"] == 2 < steps[arms["whole"]] < steps[arms["fast"]]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("full:rollout.skip_plan={plan}", "full sends gradients through whole rollouts"),
        ("sdo:rollout.skip_plan=none.json", "no file none.json"),
        ("sdo:rollout.steps=3", "rollout.steps"),
        ("sdo:rollout.skip_plan={plan},rollout.drift_steps=2", "rollout.drift_steps: the bench counts every step"),
        ("sdo:rollout.updates=2,rollout.max_change=0.1", "rollout.max_change: the bench counts beforehand"),
        ("refl:rollout.skip_plan={plan}", "exact is for rules that end at the final latent"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(rule, text, plans):
    with pytest.raises(RecipeFault) as fault:
        load_variants("bench", SMALL, [rule.format(plan=plans["whole"])])
    assert text in str(fault.value)


def test_a_compiled_network_is_not_shared_with_a_skip_plan(plans):
    rule = f"sdo:rollout.skip_plan={plans['whole']}"
    with pytest.raises(RecipeFault, match="compile: all rules share one network"):
        load_variants("bench", [*SMALL, "compile=default"], ["sdo", rule])
    assert len(load_variants("bench", [*SMALL, "compile=default"], [rule])) == 1


def test_more_live_steps_than_computed_calls_are_refused_for_that_arm(plans, words):
    rule = f"sdo:steps_per_sample=4,rollout.skip_plan={plans['whole']}"
    with pytest.raises(RecipeFault) as fault:
        open_workbench(load_variants("bench", words, ["sdo", rule]))
    assert f"recipe with --rule {rule}" in str(fault.value)


def child_here(words, **options):
    """What a child process would do and say, in this one."""
    assert words[:3] == [sys.executable, "-m", "sdo_cli.bench.memory"] and options["capture_output"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", words[2:])
        memory.main()
    return subprocess.CompletedProcess(words, 0, said.getvalue(), "")


def test_through_the_command(arms, words, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=child_here))
    few = ["--part", "cost", "--rounds", "1", "--rule", "full", "--rule", arms["whole"]]
    done = entry.run(["bench", "--out", "b", *few, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rules = json.loads((tmp_path / "b" / "bench.json").read_text())["cost"]["rules"]
    assert rules[arms["whole"]]["memory"]["tensors"] > 0 and rules[arms["whole"]]["calls"]["no_grad"] == 2
    refused = entry.run(["bench", "--rule", arms["full, fewer"], "--part", "nearness", *words], cwd=tmp_path)
    assert refused.returncode == 2 and "--part nearness compares with full" in refused.stderr


def test_updates_on_one_rollout_cost_what_is_counted(words):
    """FLOPs of a rollout with all its updates, against the parts the table is made of; and the share of plain SDO."""
    names = ["sdo", "sdo:rollout.updates=3", "sdo:rollout.updates=3,rollout.rescore=true"]
    bench = open_workbench(load_variants("bench", words, names))
    table = measure_cost(bench, rounds=1, reporter=Silent())
    plain, three, again = table.variants.values()
    for cost in table.variants.values():
        assert cost.predicted_flops == pytest.approx(cost.flops, rel=1e-3)
    assert three.calls == {"no_grad": plain.calls["no_grad"] / 3, "grad": plain.calls["grad"]}
    assert again.calls["no_grad"] == pytest.approx(plain.calls["no_grad"] / 3 + 5 / 3)
    live = table.part_flops["live call"]
    assert three.flops == pytest.approx((plain.flops - live) / 3 + live, rel=1e-3)
    assert three.mean_flops < again.mean_flops < plain.mean_flops
