"""`gradient.weight_sharpness`: the live calls' gradient at weights moved against the rewards, and the weights back."""

import dataclasses
import json

import entry
import pytest
import torch
from test_checkpoints import TINY, UNMEASURED, command
from test_gradients import close, generator, record
from test_kl_gate import DOUBTS, GATE, doubtful
from test_parallel import run as run_by
from test_replay import INSIDE, learned, plan_of
from test_replay import moved as stepped
from toy import grads, objective, toy_path

from sdo_cli.errors import PluginFault, RecipeFault
from sdo_cli.gradients.counts import counts
from sdo_cli.gradients.draft import draft_lv
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.plan import Mode
from sdo_cli.gradients.plan import plan_of as whole_calls
from sdo_cli.gradients.replay import again, replay
from sdo_cli.gradients.rules import RULES, gradient_rule
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.parallel.world import SINGLE
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training import loop
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare
from sdo_cli.training.sharp import length_of, moved

RHO = 0.3
TERMS = Terms(kl_weight=0.7, proximal=0.4, kl_gate=0.3)


def gradient_of(net, surrogate):
    value = surrogate()
    return torch.autograd.grad(value, list(net.parameters()))


def dense(net, surrogate):
    """∇S(θ + ρ ∇S(θ) / |∇S(θ)|) by autograd, of a surrogate in float64 written out."""
    before = [p.detach().clone() for p in net.parameters()]
    first = gradient_of(net, surrogate)
    length = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(net.parameters(), first, strict=True):
            p += RHO * g / length
    second = gradient_of(net, surrogate)
    with torch.no_grad():
        for p, value in zip(net.parameters(), before, strict=True):
            p.copy_(value)
    return torch.cat([g.flatten() for g in first]), torch.cat([g.flatten() for g in second])


def sharpened(net, path, outcome, update, **more):
    """The gradient that stands in the network's parameters, taken again where it leads."""
    with moved(list(net.parameters()), RHO, SINGLE) as is_moved:
        assert is_moved
        cost = again(path, outcome, update, **more)
    return cost


@pytest.mark.parametrize("micro", [MicroBatches(), MicroBatches(shortcut=3, score=1)])
@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "flow-euler"])
def test_it_is_the_surrogates_gradient_at_the_moved_weights(solver, micro):
    net, path = toy_path(solver, scale=2.0)
    plan, kept = whole_calls(path.route.calls, 4, [1, 4, 6], Mode.WEIGHTS), record(path)
    outcome = run_plan(path, plan, doubtful, terms=TERMS, micro=micro, keep=True)
    w = torch.tensor(path.coefficients.w, dtype=torch.float64)

    def surrogate():
        total = 0.0
        for i in (1, 4, 6):
            x, t, _ = kept[i]
            e = path.denoise(x, t, path.rows)
            with torch.no_grad():
                base = path.base(x, t, path.rows)
            total = total + w[i] * (outcome.g * e).sum()
            total = total + 0.7 * (GATE * (e - base).square().flatten(1).mean(1)).sum() / 3 / 4
        return total

    first, second = dense(net, surrogate)
    plain = torch.cat([p.grad.flatten() for p in net.parameters()])
    tolerance = 1e-7 if solver == "ddim" else 2e-6
    assert close(plain, first, tolerance)
    cost = sharpened(net, path, outcome, 0, terms=TERMS, micro=micro)
    assert close(grads(net), second, tolerance) and not close(second, first, 1e-2)
    assert cost.calls == {"no_grad": 0, "grad": 12} and outcome.calls["grad"] == 12


@pytest.mark.parametrize("rescore", [False, True])
def test_at_a_later_update_with_everything_on(rescore):
    """The rollout's inputs, g (of now, if scored again) and gate, and the way from the rollout's outputs."""
    net, path = toy_path(scale=3.0)
    kept = three_stage(path, plan_of(path, 3, steps_per_sample=2), doubtful, terms=TERMS).kept
    grads(net)
    stepped(net)
    outcome = replay(path, kept, 1, doubtful, terms=TERMS, rescore=rescore)
    assert torch.equal(outcome.g, kept.g) is not rescore and torch.equal(outcome.uncertainty, DOUBTS)
    mine = [call for call in kept.live if call.turn == 1]
    rows = torch.tensor([call.row for call in mine])
    x, t, then = (torch.stack([getattr(call, name) for call in mine]) for name in ("x", "t", "e"))
    factor = torch.tensor([call.factor for call in mine], dtype=torch.float64)[:, None, None, None]

    def surrogate():
        e = path.denoise(x, t, rows)
        with torch.no_grad():
            base = path.base(x, t, rows)
        held = 0.7 * (GATE[rows] * (e - base).square().flatten(1).mean(1)).sum() / 2 / 4
        return (factor * outcome.g[rows] * e).sum() + held + 0.4 * (e - then).square().flatten(1).mean(1).sum() / 2 / 4

    first, second = dense(net, surrogate)
    assert close(torch.cat([p.grad.flatten() for p in net.parameters()]), first, 1e-9)
    sharpened(net, path, outcome, 1, terms=TERMS, micro=MicroBatches(shortcut=3))
    assert close(grads(net), second, 1e-9) and not close(second, first, 1e-3)


def test_a_loss_scale_does_not_change_the_way():
    net, path = toy_path(scale=2.0)
    plan, found = whole_calls(path.route.calls, 4, [2, 5], Mode.WEIGHTS), []
    for scale in (1.0, 1024.0):
        terms = dataclasses.replace(TERMS, scale=scale)
        outcome = run_plan(path, plan, doubtful, terms=terms, keep=True)
        sharpened(net, path, outcome, 0, terms=terms)
        found.append(grads(net) / scale)
    assert close(*found, 1e-12)


def test_weights_come_back_whatever_happens():
    parameters = [torch.nn.Parameter(torch.rand(5, generator=generator(seed))) for seed in range(3)]
    before = [p.detach().clone() for p in parameters]
    parameters[0].grad, parameters[1].grad = torch.full((5,), 3e-3), torch.full((5,), -4e-3)
    assert length_of([parameters[0].grad, parameters[1].grad]) == pytest.approx(5e-3 * 5**0.5)
    with pytest.raises(KeyError), moved(parameters, 0.1, SINGLE):
        gaps = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        assert torch.cat(gaps).norm().item() == pytest.approx(0.1, rel=1e-5)
        assert bool((gaps[0] > 0).all()) and bool((gaps[1] < 0).all()) and not gaps[2].any()
        assert all(p.grad is None for p in parameters)
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for bad in (0.0, float("nan"), float("inf")):
        parameters[0].grad = torch.full((5,), bad)
        with moved(parameters, 0.1, SINGLE) as is_moved:
            assert not is_moved and torch.equal(parameters[1], before[1])
        assert parameters[0].grad is not None


def test_plans_that_cannot_be_made_again_are_refused():
    _, path = toy_path()
    with pytest.raises(ValueError, match="this plan repeats it"):
        run_plan(path, draft_lv(8, 4, path.coefficients, generator()), objective, keep=True)
    with pytest.raises(ValueError, match="keep needs a plan the three-stage engine serves"):
        run_plan(path, whole_calls(8, 4, [6, 7], Mode.THROUGH), objective, keep=True)


# training

SMALL = [*TINY, *UNMEASURED, "rollout={}", "learning_rate=1e-2"]


def trained(*words, steps=3):
    torch.set_num_threads(1)
    job, _ = prepare(load_recipe("quickstart", [*SMALL, f"max_train_steps={steps}", *words]), whole_file=False)
    return list(train(job)), torch.cat([p.detach().flatten() for p in job.parameters])


SHARP = "gradient.weight_sharpness=0.5"


def test_by_nothing_it_is_the_plain_gradient_bit_for_bit(monkeypatch):
    plain = trained()
    nothing = trained("gradient.weight_sharpness=1e-30")
    assert torch.equal(plain[1], nothing[1])
    assert [s.grad_norm for s in plain[0]] == [s.grad_norm for s in nothing[0]]
    assert [s.calls["grad"] for s in nothing[0]] == [2 * s.calls["grad"] for s in plain[0]]
    assert nothing[0][0].calls["no_grad"] == plain[0][0].calls["no_grad"]
    sharp = trained(SHARP)
    assert sharp[0][0].loss == plain[0][0].loss and not torch.equal(sharp[1], plain[1])
    monkeypatch.setattr(loop, "sharpen", lambda *a, **k: pytest.fail("costs a second pass"))
    assert torch.equal(trained("gradient.weight_sharpness=0")[1], plain[1])


def test_accumulation_and_micro_batches_go_the_same_way():
    whole, _ = trained(SHARP, "train_batch_size=4", steps=1)
    split, _ = trained(SHARP, "train_batch_size=2", "gradient_accumulation_steps=2", steps=1)
    micro, _ = trained(SHARP, "train_batch_size=4", "gradient.shortcut_micro_batch=1", steps=1)
    plain, _ = trained("train_batch_size=4", steps=1)
    assert split[0].grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-3)
    assert micro[0].grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-3)
    assert plain[0].grad_norm != pytest.approx(whole[0].grad_norm, rel=1e-2)


def test_the_cosine_of_an_old_rollout_is_that_of_two_sharp_gradients():
    """At a vanishing rate the last update of two has the fresh rollout's gradient."""
    more = ["rollout.updates=2", "rollout.drift_steps=2", "learning_rate=1e-12", "gradient.options={}"]
    steps, _ = trained(SHARP, *more, "num_inference_steps=6", steps=2)
    assert steps[1].replay.cosine == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "more", [[], ["rollout.rescore=true", "rollout.proximal=0.5", "rollout.drift_steps=3"], ["mixed_precision=bf16"]]
)
def test_stopped_inside_a_rollout_and_resumed(more, tmp_path):
    words = [*UNMEASURED, *INSIDE, SHARP, "checkpointing_steps=2", "lr_scheduler=constant", *more]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert entry.run(command(whole, *words, "-q")).returncode == 0
    assert entry.run(command(folder, *words, "max_train_steps=6", "-q")).returncode == 0
    again_ = entry.run(command(folder, *words, "--resume"))
    assert again_.returncode == 0 and "(step 6 of 7)" in again_.stderr, again_.stderr
    assert learned(folder) == learned(whole)


def test_two_processes_move_alike(tmp_path):
    words = [*TINY, *UNMEASURED, "rollout={}", SHARP, "train_batch_size=1", "max_train_steps=2", "-q"]
    rows = []
    for size, split in ((1, 2), (2, 1)):
        folder = tmp_path / str(size)
        done = run_by(folder, *words, f"gradient_accumulation_steps={split}", size=size)
        assert done.returncode == 0, done.stderr
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for mine, theirs in zip(*rows, strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3) and mine["calls"] == theirs["calls"]
    plain = trained("train_batch_size=1", "gradient_accumulation_steps=2", steps=1)[0][0]
    assert plain.grad_norm != pytest.approx(rows[1][0]["grad_norm"], rel=1e-2)


def test_live_calls_count_twice():
    plan = whole_calls(8, 4, [1, 4], Mode.WEIGHTS)
    plain = counts(plan, "none", slice_size=4, regularised=True)
    sharp = counts(plan, "none", slice_size=4, regularised=True, sharp=True)
    assert (plain["live call"], sharp["live call"]) == (2, 4)
    # the base is asked beside each
    assert sharp["call"] == plain["call"] + 2 and sharp["score"] == plain["score"]


WRONG = [
    (["train=full"], "keeps a copy of the weights"),
    (["gradient.rule=full"], "full chains its live calls on one graph; use sdo"),
    (["gradient.rule=draft-lv"], "draft-lv repeats its live call"),
    (["gradient.weight_sharpness=-1"], "gradient.weight_sharpness: must not be negative"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[words[0] for words, _ in WRONG])
def test_what_cannot_be_is_refused(words, sentence):
    with pytest.raises(RecipeFault) as fault:
        load_recipe("quickstart", ["rollout={}", "gradient.options={}", SHARP, *words])
    assert sentence in str(fault.value)


def test_a_plugins_rule_that_repeats_is_refused():
    @gradient_rule("repeating", summary="the last call, and again")
    def repeating(calls, batch, coefficients, generator):
        return draft_lv(calls, batch, coefficients, generator)

    try:
        with pytest.raises(PluginFault, match=r"repeats calls, and gradient\.weight_sharpness makes live calls again"):
            trained(SHARP, "gradient.rule=repeating", "gradient.options={}", steps=1)
    finally:
        del RULES["repeating"]
