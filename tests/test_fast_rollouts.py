"""Pictures drawn in few steps by a LoRA that training does not keep; gradients of the network without it."""

import json
import re
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from test_rollouts import RECIPE, sdo
from toy import Toy, grads, objective, toy_path

from sdo_cli.doctor.workload import workload_of
from sdo_cli.drawing.draw import draw_noise, encode_pair, make_path
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.gradients.counts import counts
from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.three_stage import three_stage
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.models.second_lora import load_second, network_with
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.rule_choice import cost_of
from sdo_cli.recipe.schema import LoraSpec
from sdo_cli.sampling.guidance import Guided
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.training.job import plan_step
from sdo_cli.training.loop import train
from sdo_cli.training.lora import add_lora
from sdo_cli.training.prepare import prepare
from sdo_cli.training.sharding import check_shardable

NAME = "pytorch_lora_weights.safetensors"
FAST_SOLVER = ("solver=lcm", "num_inference_steps=2")
FAST = ("rollout.lora=fast", "rollout.solver=lcm", "rollout.num_inference_steps=2")


def fast_lora(model, folder, *, seed=5, text=False, targets=("to_q", "to_v", "conv1")):
    """A LoRA that changes what is drawn, on other layers than those that are trained."""
    family = load_family(ModelSource(str(model)))
    add_lora(family, LoraSpec(rank=2, target_modules=list(targets), text_encoder=text), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (family.denoiser, *family.text_encoders.values()):
            for key, parameter in part.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    family.save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def where(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    (folder / "mine.yaml").write_text(f"model: {small('sd15')}" + RECIPE)
    fast_lora(small("sd15"), folder / "fast")
    return folder


@pytest.fixture(autouse=True)
def here(where, monkeypatch):
    monkeypatch.chdir(where)


def prepared(*overrides):
    return prepare(load_recipe("mine.yaml", list(overrides)))[0]


@cache
def trained(*overrides):
    return list(train(prepared(*overrides)))


def losses(steps):
    return [(step.loss, step.grad_norm) for step in steps]


# the estimator


def fast_path(**options):
    """The toy's path, drawn by another toy at another guidance."""
    net, path = toy_path("lcm", 4, scale=3.0, **options)
    other = Toy().shifted()
    condition, negative = path.denoise.condition, path.denoise.negative
    return (
        net,
        replace(path, fast=Guided(other, condition, negative, 1.0)),
        replace(path, denoise=Guided(other, condition, negative, 1.0)),
    )


def test_live_calls_are_the_slow_networks_at_the_states_of_the_fast_one():
    """g is at the fast network's image; every call's weight is the fast solver's (docs/gradients.md)."""
    net, path, drawn = fast_path()
    states = []

    def watched(x, t, rows):
        states.append((x, t))
        return drawn.denoise(x, t, rows)

    x_N = sample_latents(replace(drawn, denoise=watched)).requires_grad_()
    loss = objective(x_N, path.rows).losses.sum() / 4
    (g,) = torch.autograd.grad(loss, x_N)
    surrogate = sum(
        w * (g * path.denoise(x, t, path.rows)).sum() for w, (x, t) in zip(path.coefficients.w, states, strict=True)
    )
    surrogate.backward()
    expected = grads(net)
    found = three_stage(path, Plan(torch.full((4, 4), Mode.WEIGHTS), torch.ones(4, 4)), objective)
    assert torch.equal(found.x_N, x_N.detach())
    assert torch.allclose(grads(net), expected, rtol=1e-10)


def test_the_same_network_twice_is_plain_sdo():
    net, path = toy_path("tcd", 4, scale=3.0, eta=0.3)
    plan = Plan(torch.full((4, 4), Mode.WEIGHTS), torch.ones(4, 4))
    three_stage(path, plan, objective)
    plain = grads(net)
    three_stage(replace(path, fast=path.denoise), plan, objective)
    assert torch.equal(grads(net), plain)


def test_chains_and_latents_are_refused():
    _, path, _ = fast_path()
    plan = Plan(torch.full((4, 4), Mode.WEIGHTS), torch.ones(4, 4))
    with pytest.raises(ValueError, match="of another network"):
        one_graph(path, plan, objective)
    path.x_0.requires_grad_()
    with pytest.raises(ValueError, match="serves weights"):
        three_stage(path, plan, objective)


# the adapter


def test_it_is_on_in_its_own_calls_alone_and_what_is_trained_stays_so(where, small):
    family = load_family(ModelSource(str(small("sd15"))))
    alone = load_family(ModelSource(str(small("sd15"))))
    alone.load_lora("fast")
    plain = load_family(ModelSource(str(small("sd15"))))
    trained = add_lora(family, LoraSpec(rank=2), seed=0)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    condition = family.encode(["a cat"])
    name = load_second(family, "fast")
    assert load_second(family, "fast") == name and load_second(family, "fast", scale=0.5) != name
    fast = network_with(family, name)
    assert torch.equal(family.network(x, t, condition), plain.network(x, t, condition))
    assert torch.allclose(fast(x, t, condition), alone.network(x, t, condition), atol=1e-6)
    assert not torch.allclose(fast(x, t, condition), plain.network(x, t, condition), atol=1e-3)
    # as base_network switches adapters off and on again
    assert torch.equal(family.base_network(x, t, condition), plain.network(x, t, condition))
    on = [p for p in family.denoiser.parameters() if p.requires_grad]
    assert {id(p) for p in on} == {id(p) for p in trained}
    # half of it
    half = network_with(family, load_second(family, "fast", scale=0.5))
    alone.pipeline.set_adapters(["lora"], [0.5])
    assert torch.allclose(half(x, t, condition), alone.network(x, t, condition), atol=1e-6)


def test_it_is_added_to_what_was_learned_so_far(where, small):
    family = load_family(ModelSource(str(small("sd15"))))
    add_lora(family, LoraSpec(start_from="fast"), seed=0)
    twice = network_with(family, load_second(family, "fast"))
    double = load_family(ModelSource(str(small("sd15"))))
    double.load_lora("fast", scale=2.0)
    x, t, condition = torch.randn(1, 4, 8, 8), torch.tensor([300]), family.encode(["a cat"])
    assert torch.allclose(twice(x, t, condition), double.network(x, t, condition), atol=1e-5)


def test_layers_of_text_encoders_are_refused(small, tmp_path):
    folder = fast_lora(small("sd15"), tmp_path / "text", text=True, targets=("to_q",))
    with pytest.raises(RecipeFault, match=r"rollout\.lora: the LoRA .* has layers for the text encoders"):
        prepared(f"rollout.lora={folder}", *FAST[1:])


def test_another_models_lora_is_refused(small, tmp_path):
    with pytest.raises(RecipeFault, match=r"rollout\.lora: .* was made for another model: 29 of 40 layers"):
        prepared(f"rollout.lora={fast_lora(small('sdxl'), tmp_path / 'xl')}", *FAST[1:])


# training


def test_training_draws_with_it_and_samples_without(where):
    job = prepared(*FAST)
    plan = plan_step(job, 0)
    assert plan.calls == 2 and job.drawn_now.settings.guidance == 1.0
    steps = trained(*FAST)
    assert [step.calls for step in steps] == [{"no_grad": 4, "grad": 2}] * 3
    assert all(step.cheap_rollouts for step in steps)
    assert losses(steps) != losses(trained(*FAST_SOLVER))
    # without what it adds, and as guided as the live calls: plain training by its solver
    off, plain = trained(*FAST, "rollout.lora_scale=0", "rollout.guidance_scale=2"), trained(*FAST_SOLVER)
    assert [step.loss for step in off] == pytest.approx([step.loss for step in plain], rel=1e-5)


def test_live_calls_keep_the_recipes_guidance(where):
    """Rows of the network: one a picture where the LoRA draws, two where gradients are taken."""
    job, rows = prepared(*FAST, "max_train_steps=1"), []
    call = job.family.denoiser.forward

    def counted(x, *given, **named):
        rows.append((len(x), torch.is_grad_enabled()))
        return call(x, *given, **named)

    job.family.denoiser.forward = counted
    list(train(job))
    assert rows == [(2, False), (2, False), (4, True)]


def test_noise_of_its_solver_is_drawn_for_it(where):
    job = prepared(*FAST)
    noise = draw_noise(job.family, job.drawn_now.settings, [torch.Generator().manual_seed(0)])
    condition, negative = encode_pair(job.embed, job.drawn_now.settings, job.prompts[:1])
    assert (
        noise.injected is not None
        and make_path(job.family, job.drawn_now.settings, noise, condition, negative).route.calls == 2
    )


@pytest.mark.parametrize("more", [("kl_weight=0.1",), ("gradient.rule=draft-lv",), ("gradient.rule=refl",)])
def test_rules_of_one_step_go_with_it(where, more):
    (step,) = train(prepared(*FAST, *more, "max_train_steps=1"))
    assert step.grad_norm > 0


def test_timesteps_of_its_own(where):
    job = prepared("rollout.lora=fast", "rollout.solver=tcd", "rollout.timesteps=[800, 300, 20]", "rollout.eta=0.3")
    path_steps = make_path(
        job.family,
        job.drawn_now.settings,
        draw_noise(job.family, job.drawn_now.settings, [torch.Generator()]),
        job.embed(job.prompts[:1]),
        None,
    ).route.begin()[1]
    assert path_steps.tolist() == [800, 300, 20]
    (step,) = train(replace(job, recipe=replace(job.recipe, max_train_steps=1)))
    assert step.calls["no_grad"] == 6


def test_drift_is_watched_and_ends_it(where):
    watched = trained(*FAST, "rollout.drift_steps=2")
    assert [step.drift is not None for step in watched] == [True, False, True]
    drift = watched[0].drift
    assert drift.distance > 0.01 and -1 <= drift.cosine <= 1
    assert drift.loss == pytest.approx(trained(*FAST)[0].loss - trained()[0].loss, rel=1e-4)
    over = trained(*FAST, "rollout.drift_steps=2", "rollout.max_drift=1e-6")
    assert [step.cheap_rollouts for step in over] == [False] * 3 and losses(over) == losses(trained())


def test_only_what_was_trained_is_saved_and_the_run_goes_on_bit_for_bit(where, tmp_path):
    words = ("--recipe", str(where / "mine.yaml"), f"rollout.lora={where / 'fast'}", *FAST[1:], "rollout.drift_steps=2")
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    done = sdo("finetune", *words, "--out", str(whole), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"step 1: rollouts end \d+\.\d% from those in full, cosine of the gradients .*, loss [+-]", done.stderr
    )
    assert sdo("finetune", *words, "max_train_steps=1", "-q", "--out", str(cut), cwd=tmp_path).returncode == 0
    assert sdo("finetune", *words, "-q", "--resume", "--out", str(cut), cwd=tmp_path).returncode == 0
    recipe = ("--recipe", str(where / "mine.yaml"), "max_train_steps=1", "-q", "--out", str(plain))
    assert sdo("finetune", *recipe, cwd=tmp_path).returncode == 0
    one, other = load_file(whole / NAME), load_file(cut / NAME)
    assert one.keys() == other.keys() == load_file(plain / NAME).keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["drift"]["loss"] is not None and rows[0]["cheap_rollouts"]
    # the folder runs again from itself, and another file is another run
    assert sdo("finetune", "--recipe", str(cut / "resolved.yaml"), "--dry-run", cwd=tmp_path).returncode == 0
    fast_lora(load_recipe(str(where / "mine.yaml")).recipe.model, tmp_path / "another", seed=6)
    words = [word.replace(str(where / "fast"), str(tmp_path / "another")) for word in words]
    refused = sdo("finetune", *words, "--resume", "max_train_steps=5", "--out", str(cut), cwd=tmp_path)
    assert refused.returncode == 2 and "rollout.lora" in refused.stderr


def test_calls_without_guidance_cost_half_in_the_estimate(where):
    def calls(*more):
        return workload_of(load_recipe("mine.yaml", list(more)), on_cpu=True).calls

    assert calls() == 6 and calls(*FAST) == 1 and calls(*FAST, "rollout.guidance_scale=3") == 2


PROBLEMS = {
    "solver": (
        ("rollout.lora=fast", "rollout.num_inference_steps=4"),
        "rollout.solver: is missing, and a LoRA file names",
    ),
    "steps": (("rollout.lora=fast", "rollout.solver=lcm"), "rollout.num_inference_steps: is missing"),
    "unknown": ((*FAST, "rollout.solver=lmc"), "rollout.solver: unknown solver 'lmc'"),
    "eta": ((*FAST, "rollout.eta=0.5"), "rollout.eta: is for ddim, tcd; solver lcm takes none"),
    "much": ((*FAST, "rollout.solver=tcd", "rollout.eta=1.5"), "must be between 0 and 1"),
    "guidance": ((*FAST, "rollout.guidance_scale=-1"), "rollout.guidance_scale: must be a number from 0"),
    "scale": ((*FAST, "rollout.lora_scale=.nan"), "rollout.lora_scale: must be a number"),
    "rising": ((*FAST[:2], "rollout.timesteps=[300, 800]"), "rollout.timesteps: must fall from the noisiest"),
    "none": ((*FAST[:2], "rollout.timesteps=[]"), "rollout.timesteps: is empty"),
    "other number": ((*FAST, "rollout.timesteps=[800]"), "names 1 steps, num_inference_steps is 2"),
    "chained": ((*FAST, "gradient.rule=full"), "full sends gradients through whole rollouts, which another network"),
    "full": ((*FAST, "train=full"), "is an adapter beside the trained one"),
    "compile": ((*FAST, "compile=default"), "rollout.lora: is switched on and off"),
    "plan": ((*FAST, "rollout.skip_plan=mine.yaml"), "take one of them"),
    "alone": (("rollout.solver=lcm",), "rollout.solver: says how rollout.lora draws"),
    "guidance alone": (("rollout.guidance_scale=1.5",), "give rollout.num_inference_steps too, or set guidance_scale"),
    "guidance of one": (("rollout.num_inference_steps=2", "rollout.guidance_scale=1"), "must be a number above 1"),
    "guidance of none": (
        ("rollout.num_inference_steps=2", "rollout.guidance_scale=2", "guidance_scale=1"),
        "sampling has no guidance (guidance_scale 1); take this out",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_told_before_anything_loads(case):
    overrides, said = PROBLEMS[case]
    with pytest.raises(RecipeFault, match=re.escape(said)):
        load_recipe("mine.yaml", list(overrides))


def test_shards_do_not_go_with_it(where):
    recipe = load_recipe("mine.yaml", list(FAST)).recipe
    with pytest.raises(EnvironmentFault, match="all processes make the same calls"):
        check_shardable(replace(recipe, train="full"), "FSDP")


# which rule


@pytest.mark.parametrize(
    ("words", "rule", "said"),
    [
        (["num_inference_steps=1"], "full", "a step of 1 call costs sdo 4 and full 4 forward passes"),
        (["num_inference_steps=2"], "sdo", "a step of 2 calls costs sdo 5 and full 8 forward passes"),
        (["num_inference_steps=2", "gradient.checkpointing=none"], "full", "costs sdo 5 and full 6"),
        (["num_inference_steps=3", "gradient.checkpointing=none"], "sdo", "costs sdo 6 and full 9"),
        (["rollout.num_inference_steps=1"], "full", "a step of 1 call costs"),
        (["solver=pndm", "num_inference_steps=2", "gradient.checkpointing=none"], "sdo", "a step of 3 calls costs"),
        (
            ["num_inference_steps=1", "gradient.score_micro_batch=1"],
            "sdo",
            "gradient.score_micro_batch goes with rules",
        ),
        ([*FAST, "rollout.num_inference_steps=1"], "sdo", "and rollout.lora goes with rules of one step alone"),
    ],
)
def test_auto_takes_full_backpropagation_where_that_costs_about_as_much(words, rule, said):
    loaded = load_recipe("mine.yaml", ["gradient.rule=auto", *words])
    assert loaded.recipe.gradient.rule == loaded.resolved()["gradient"]["rule"] == rule
    assert loaded.notes[0].startswith(f"gradient.rule auto: {rule}; ") and said in loaded.notes[0]


def test_auto_counts_as_the_network_is_run():
    """Its forward passes are those of the plans, a backward pass two of them."""
    passes = {"call": 1, "live call": 3, "live call, through": 3, "live call, recomputed": 4}
    passes["live call, through, recomputed"] = 4
    for rule, checkpointing, steps in product(("sdo", "full"), ("calls", "none"), (1, 2, 4)):
        words = [f"gradient.rule={rule}", f"num_inference_steps={steps}"]
        words += [f"gradient.checkpointing={checkpointing}"] if rule == "full" else []
        found = counts(plan_step(prepared(*words), 0), checkpointing if rule == "full" else "none", slice_size=2)
        found.pop("score")
        expected = sum(number * passes[name] for name, number in found.items())
        assert cost_of(rule, steps, recomputed=checkpointing == "calls") == expected


def test_auto_is_said_and_takes_no_options(tmp_path, where):
    words = ["finetune", "--recipe", where / "mine.yaml", "gradient.rule=auto", "num_inference_steps=1"]
    done = sdo(*words, "max_train_steps=1", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("gradient.rule auto: full") == 1
    shown = sdo(*words, "--dry-run", cwd=tmp_path)
    assert "rule: full" in shown.stdout and "gradient.rule auto: full" in shown.stderr
    with pytest.raises(RecipeFault, match=r"gradient\.options: belong to one rule; name that in place of auto"):
        load_recipe("mine.yaml", ["gradient.rule=auto", "gradient.options={k: 1}"])
