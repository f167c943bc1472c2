"""Training with rollouts that cost less than sampling: shorter ones, and ones under a skip plan."""

import json
import os
import re
from dataclasses import replace
from functools import cache

import entry
import pytest
import torch
from safetensors.torch import load_file

from sdo_cli.drawing.pruned import made_for, wiring_of
from sdo_cli.errors import RecipeFault
from sdo_cli.prune.baselines import uniform
from sdo_cli.prune.ratios import Budget
from sdo_cli.recipe.load import load_recipe
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.skipping.skip_plan import SkipPlan, load_plan
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import make_plan, plan_step
from sdo_cli.training.loop import train
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import prepare
from sdo_cli.training.rollouts import flat_gradient

RECIPE = """
rewards: [colorfulness]
prompts: {lines: [a tiger on the cat, a bus on the dog, a rose on a cat]}
max_train_steps: 3
train_batch_size: 2
solver: ddim
num_inference_steps: 6
guidance_scale: 2.0
learning_rate: 1e-2
checkpointing_steps: 1
lora: {rank: 2}
"""


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def where(small, tmp_path_factory):
    """A recipe beside a plan that repeats every second call, and one that skips inner blocks."""
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "mine.yaml").write_text(f"model: {small('sd15')}" + RECIPE)
    job, _ = prepare(load_recipe(str(folder / "mine.yaml"), []))
    condition = job.embed(job.prompts[:1])
    wiring = wiring_of(job.family, "blocks", condition)
    budget = Budget(torch.full((5,), 0.2, dtype=torch.float64), 0.0, False)
    made = made_for(job.family, job.draw_settings)
    SkipPlan(made, "blocks", wiring, uniform(0.5, 6, wiring, budget)).save(folder / "half.json")
    runs = torch.ones(6, 5, dtype=torch.bool)
    runs[[1, 2, 4], 1:4] = False
    runs[5] = False
    SkipPlan(made, "blocks", wiring, runs).save(folder / "inner.json")
    SkipPlan(replace(made, num_inference_steps=7), "blocks", wiring, torch.ones(7, 5).bool()).save(
        folder / "seven.json"
    )
    return folder


def prepared(where, *overrides):
    return prepare(load_recipe(str(where / "mine.yaml"), list(overrides)))[0]


@pytest.fixture(scope="module")
def trained(where):
    """trained(*overrides) -> the steps of that training, each run once."""
    return cache(lambda *overrides: list(train(prepared(where, *overrides))))


def losses(steps):
    return [(step.loss, step.grad_norm) for step in steps]


def test_the_plan_lies_beside_the_recipe_and_draws_among_computed_calls(where):
    job = prepared(where, "rollout.skip_plan=inner.json")
    plan = plan_step(job, 0)
    assert plan.calls == 6 and not bool(plan.live[5].any())
    # call 4 is handed out again by call 5: both weights are its
    c = coefficients_of(job.drawn_now.skips and _route(job))
    merged = c.merged(job.rollouts.skips.plan.sources)
    assert merged.w[4] == pytest.approx(c.w[4] + c.w[5]) and merged.w[5] == 0


def _route(job):
    from sdo_cli.drawing.draw import make_route

    return make_route(job.family, job.drawn_now.settings)


def test_whole_draws_among_all_calls(where):
    job = prepared(where, "rollout.skip_plan=inner.json", "rollout.estimator=whole")
    chosen = {
        int(i) for seed in range(40) for i in make_plan(job, torch.Generator().manual_seed(seed)).live.nonzero()[:, 0]
    }
    assert chosen == set(range(6))


def test_a_plan_with_everything_computed_trains_as_without(where, trained):
    """The same draws, losses and gradients, bit for bit; and other ones with plans that skip."""
    found = load_plan(where / "half.json")
    replace(found, runs=torch.ones_like(found.runs)).save(where / "open.json")
    for estimator in ("exact", "whole"):
        opened = trained("rollout.skip_plan=open.json", f"rollout.estimator={estimator}")
        assert losses(opened) == losses(trained())
    for plan in ("half.json", "inner.json"):
        assert losses(trained(f"rollout.skip_plan={plan}")) != losses(trained())


def test_fewer_steps_are_those_of_a_recipe_with_fewer(trained):
    few, own = trained("rollout.num_inference_steps=3"), trained("num_inference_steps=3")
    assert losses(few) == losses(own) != losses(trained())
    assert [step.calls for step in few] == [step.calls for step in own]


def test_fewer_steps_may_have_less_guidance_in_calls_with_gradients_too(trained):
    few = trained("rollout.num_inference_steps=3", "rollout.guidance_scale=1.5")
    own = trained("num_inference_steps=3", "guidance_scale=1.5")
    assert losses(few) == losses(own) and [a.grad_norm for a in few] == [b.grad_norm for b in own]
    assert losses(few) != losses(trained("rollout.num_inference_steps=3"))


def test_calls_are_counted_as_they_are_made(trained):
    for step in trained("rollout.skip_plan=half.json"):
        assert step.calls == {"no_grad": 3 * 2, "grad": 2} and step.cheap_rollouts


DRIFTING = ("rollout.skip_plan=half.json", "rollout.drift_steps=2")


def test_drift_is_looked_at_and_ends_what_drifted_too_far(trained):
    free, limited = trained(*DRIFTING), trained(*DRIFTING, "rollout.max_drift=1e-6")
    assert [r.drift is not None for r in free] == [True, False, True]
    assert all(r.cheap_rollouts for r in free) and free[0].drift.distance > 1e-3
    assert -1 <= free[0].drift.cosine <= 1
    # switched off at the first look: all of it is drawn in full, as without a plan
    assert [r.cheap_rollouts for r in limited] == [False] * 3
    assert [r.drift is not None for r in limited] == [True, False, False]
    assert losses(limited) == losses(trained())
    # looking changes nothing
    assert losses(free) == losses(trained("rollout.skip_plan=half.json"))


def test_drift_is_what_it_says(where, trained):
    job, first = prepared(where, *DRIFTING), trained(*DRIFTING)[0]
    order = PromptOrder(job.prompts, job.recipe.seed)

    def once(job):
        for parameter in job.parameters:
            parameter.grad = None
        (outcome,) = accumulate(job, order, 0)
        return outcome.x_N.double(), flat_gradient(job.parameters)

    (short, mine), (full, theirs) = once(job), once(replace(job, rollouts=None))
    assert first.drift.distance == pytest.approx(((short - full).norm() / full.norm()).item(), rel=1e-6)
    assert first.drift.cosine == pytest.approx(torch.cosine_similarity(mine, theirs, 0).item(), rel=1e-6)


PROBLEMS = {
    "chained": (["rollout.skip_plan=half.json", "gradient.rule=full"], "full sends gradients through whole rollouts"),
    "missing": (["rollout.skip_plan=none.json"], "rollout.skip_plan: no file none.json; it is looked for beside"),
    "eta": (["rollout.skip_plan=half.json", "eta=0.5"], "leaves calls of a solver without noise out"),
    "early": (["rollout.skip_plan=half.json", "gradient.rule=refl"], "exact is for rules that end at the final latent"),
    "nothing": (["rollout.drift_steps=5"], "training draws in full: there is nothing to drift"),
    "fixed": (
        ["rollout.skip_plan=half.json", "gradient.options={step_choice: fixed, step: 1}"],
        "step is a call of the whole solver",
    ),
    "noise": (
        ["rollout.num_inference_steps=3", "rollout.drift_steps=2", "eta=0.5"],
        "of the same noise; with fresh noise",
    ),
    "limit": (["rollout.max_drift=0.1"], "is looked at every drift_steps"),
    "negative": (["rollout.num_inference_steps=-1"], "must not be negative"),
    "options": (
        ["rollout.num_inference_steps=3", "gradient.options={steps_per_sample: 5}"],
        "steps_per_sample must be",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_told_before_anything_loads(where, case):
    overrides, said = PROBLEMS[case]
    with pytest.raises(RecipeFault, match=re.escape(said)):
        load_recipe(str(where / "mine.yaml"), overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.skip_plan=mine.yaml"], "rollout.skip_plan: .*mine.yaml is not a skip plan"),
        (["rollout.skip_plan=seven.json"], "was made for 7 steps, not 6"),
        (["rollout.skip_plan=half.json", "solver=euler"], "for the solver ddim, not euler"),
        (
            ["rollout.skip_plan=half.json", "gradient.options={steps_per_sample: 5}"],
            "steps_per_sample must be in 1 … 3",
        ),
        (["rollout.skip_plan=inner.json", "gradient.negative_gradient=false"], "runs both branches apart"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(where, overrides, said):
    with pytest.raises(RecipeFault, match=said):
        prepared(where, *overrides)


@pytest.mark.parametrize("rule", ["refl", "draft-lv", "drtune"])
def test_rules_that_end_early_run_the_whole_network_again(where, rule):
    overrides = ("rollout.skip_plan=half.json", "rollout.estimator=whole", f"gradient.rule={rule}", "max_train_steps=1")
    (result,) = train(prepared(where, *overrides))
    assert result.grad_norm > 0


def test_a_run_with_a_plan_resumes_bit_for_bit_even_when_it_was_over(where, tmp_path):
    words = ("--recipe", str(where / "mine.yaml"), "rollout.skip_plan=half.json", "rollout.drift_steps=2", "-q")
    for limit in ("0.9", "1e-6"):
        whole, cut = tmp_path / f"whole-{limit}", tmp_path / f"cut-{limit}"
        more = (*words, f"rollout.max_drift={limit}")
        assert sdo("finetune", *more, "--out", str(whole), cwd=tmp_path).returncode == 0
        assert sdo("finetune", *more, "max_train_steps=2", "--out", str(cut), cwd=tmp_path).returncode == 0
        done = sdo("finetune", *more, "--resume", "--out", str(cut), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        name = "pytorch_lora_weights.safetensors"
        one, other = load_file(whole / name), load_file(cut / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
        rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, cut)]
        kept = [[(r["loss"], r["cheap_rollouts"], r["drift"]) for r in side] for side in rows]
        assert kept[0] == kept[1] and kept[0][-1][1] is (limit == "0.9")
        # the folder runs again from itself
        again = sdo("finetune", "--recipe", str(cut / "resolved.yaml"), "--dry-run", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    more = (*more, "--resume", "max_train_steps=5", "rollout.skip_plan=inner.json")
    other = sdo("finetune", *more, "--out", str(cut), cwd=tmp_path)
    assert other.returncode == 2 and "rollout.skip_plan" in other.stderr


def test_two_processes_look_at_the_same_drift(where, tmp_path):
    from test_parallel import finish, start

    words = ["finetune", "--recipe", where / "mine.yaml", "rollout.skip_plan=half.json", "rollout.drift_steps=2", "-q"]
    one = sdo(*map(str, words), "gradient_accumulation_steps=2", "--out", str(tmp_path / "one"), cwd=tmp_path)
    codes, _, errs = finish(start(2, [*map(str, words), "--out", str(tmp_path / "two")]))
    assert one.returncode == 0 and codes == [0, 0], one.stderr + errs[0]
    rows = [json.loads((tmp_path / f / "metrics.jsonl").read_text().splitlines()[2]) for f in ("one", "two")]
    assert rows[0]["drift"]["distance"] == pytest.approx(rows[1]["drift"]["distance"], rel=1e-4)
    assert rows[0]["drift"]["cosine"] == pytest.approx(rows[1]["drift"]["cosine"], abs=1e-3)


def test_drift_is_said_and_shown(where, tmp_path):
    words = ("rollout.skip_plan=half.json", "rollout.drift_steps=2", "rollout.max_drift=1e-6", "max_train_steps=1")
    done = sdo("finetune", "--recipe", str(where / "mine.yaml"), *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 1: rollouts end \d+\.\d% from those in full, cosine of the gradients", done.stderr)
    assert "training draws in full from here on" in done.stderr
    assert load_plan(tmp_path / "run/skip_plan.json").made_for.model == load_plan(where / "half.json").made_for.model


def test_the_estimate_knows_cheaper_rollouts(where):
    from sdo_cli.doctor.workload import workload_of
    from sdo_cli.estimate.units import unit_flops
    from sdo_cli.models.load import ModelSource

    def calls(*overrides):
        return workload_of(load_recipe(str(where / "mine.yaml"), list(overrides)), on_cpu=True).calls

    assert calls() == 6 and calls("rollout.num_inference_steps=3") == 3
    assert calls("rollout.skip_plan=half.json") == pytest.approx(3)
    model = load_recipe(str(where / "mine.yaml"), []).recipe.model
    share = unit_flops(ModelSource(model), "blocks").kept(load_plan(where / "inner.json"))
    assert 0.4 < share < 0.9 and calls("rollout.skip_plan=inner.json") == pytest.approx(6 * share)


@pytest.mark.parametrize(
    "words", [["rollout.skip_plan=half.json"], ["rollout.num_inference_steps=3", "rollout.drift_steps=2"]]
)
@pytest.mark.parametrize("by", ["FSDP", "DeepSpeed"])
def test_in_parts_it_is_refused(where, words, by):
    from sdo_cli.errors import EnvironmentFault
    from sdo_cli.training.sharding import check_shardable

    recipe = load_recipe(str(where / "mine.yaml"), ["train=full", *words]).recipe
    with pytest.raises(EnvironmentFault, match=f"asks for {by}, under which all processes make the same calls"):
        check_shardable(recipe, by)
    check_shardable(replace(recipe, rollout=replace(recipe.rollout, skip_plan=None, drift_steps=0)), by)
