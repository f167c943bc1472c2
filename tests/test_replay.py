"""Several updates per rollout: shares of a draw, sums, surrogates in float64; whole runs that are stopped inside."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import entry
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from test_checkpoints import TINY, UNMEASURED, command, lines_until
from test_gradients import check_direction, close, generator
from test_parallel import run as run_by
from test_rollouts import where  # noqa: F401
from toy import CONFIGS, TOLERANCE, grads, objective, toy_path

from sdo_cli.errors import PluginFault
from sdo_cli.gradients.drtune import drtune
from sdo_cli.gradients.flowbp import flowbp_sparse
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.replay import replay
from sdo_cli.gradients.rules import RULES, gradient_rule
from sdo_cli.gradients.sdo import sdo
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare

CHOICES = ("stratified", "uniform", "weight-proportional", "late-biased")


def moved(net, seed=0, size=0.05):
    """The network after a step of some optimizer."""
    found = generator(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=found, dtype=torch.float64)


def plan_of(path, updates, seed=0, **options):
    return sdo(path.route.calls, 4, path.coefficients, generator(seed), updates=updates, **options)


# how live calls are shared out


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("k", "updates"), [(1, 4), (2, 3), (1, 8)])
def test_every_update_has_its_own_calls(choice, k, updates):
    _, path = toy_path()
    plan = plan_of(path, updates, step_choice=choice, steps_per_sample=k)
    parts = [plan.of_updates(update) for update in range(updates)]
    assert all(part.turn is None and bool((part.live.sum(0) == k).all()) for part in parts)
    assert torch.equal(sum(part.live.long() for part in parts), plan.live.long())
    assert bool((plan.live.sum(0) == k * updates).all())


def test_calls_of_one_update_are_spread_over_the_way_and_over_the_batch():
    _, path = toy_path(steps=20)
    plan = sdo(20, 8, path.coefficients, generator(), updates=5, steps_per_sample=2)
    for update in range(5):
        live = plan.of_updates(update).live
        # the two of a sample are half the way apart, give or take a stratum
        first, second = (live.long().argmax(0), 19 - live.flip(0).long().argmax(0))
        assert bool(((second - first - 10).abs() <= 2).all())
        # 16 of 20 calls, each in one sample, or the next
        assert int(live.any(1).sum()) >= 13 and int(live.sum(1).max()) <= 2


def test_one_draw_per_batch_stays_one():
    _, path = toy_path()
    plan = plan_of(path, 3, step_choice="per-batch")
    assert all(len(plan.of_updates(update).live.T.unique(dim=0)) == 1 for update in range(3))


@pytest.mark.parametrize("choice", CHOICES)
def test_each_update_alone_is_without_bias(choice):
    """The mean weight of a call over many draws is one, in every update: so is its expectation times 1/p."""
    _, path = toy_path()
    draws, updates = 600, 3
    total = torch.zeros(updates, draws, path.route.calls, dtype=torch.float64)
    for draw in range(draws):
        plan = plan_of(path, updates, seed=draw, step_choice=choice)
        for update in range(updates):
            total[update, draw] = plan.of_updates(update).weight.mean(1)
    mean, error = total.mean(1), total.std(1) / draws**0.5
    assert bool(((mean - 1).abs() <= 4.5 * error + 1e-9).all()), (mean, error)


def test_drtune_and_flowbp_share_theirs_out():
    _, path = toy_path(steps=20)
    plan = drtune(20, 4, path.coefficients, generator(1), k=2, updates=3)
    for update in range(3):
        part = plan.of_updates(update)
        assert bool((part.live.sum(0) == 2).all()) and torch.equal(part.ends, plan.ends)
    gaps = [plan.of_updates(update).live[:, 0].nonzero().flatten().diff().item() for update in range(3)]
    assert len(set(gaps)) == 1
    plan = flowbp_sparse(20, 4, path.coefficients, generator(1), k=2, rescale=1.0, updates=3)
    size = torch.tensor(path.coefficients.w, dtype=torch.float64).abs()
    for update in range(3):
        part = plan.of_updates(update)
        assert (part.weight[:, 0] * size).sum().item() == pytest.approx(size.sum().item())


def test_one_update_draws_as_ever():
    _, path = toy_path()
    for rule in (sdo, drtune, flowbp_sparse):
        one, plain = (rule(8, 4, path.coefficients, generator(5), **more) for more in ({"updates": 1}, {}))
        assert torch.equal(one.mode, plain.mode) and torch.equal(one.weight, plain.weight) and one.turn is None


# what the updates send back


@pytest.mark.parametrize("solver", CONFIGS)
def test_at_a_vanishing_rate_updates_add_up_to_their_draws(solver):
    """R updates with the weights of the rollout = R draws of their own on the same trajectory = all in one."""
    net, path = toy_path(solver, scale=3.0)
    plan = plan_of(path, 4)
    kept = three_stage(path, plan, objective).kept
    for update in (1, 2, 3):
        replay(path, kept, update, objective)
    together = grads(net)
    alone = torch.zeros_like(together)
    for update in range(4):
        three_stage(path, plan.of_updates(update), objective)
        alone += grads(net)
    three_stage(path, dataclasses.replace(plan, turn=None), objective)
    at_once = grads(net)
    assert close(together, alone, TOLERANCE[solver]) and close(together, at_once, TOLERANCE[solver])
    # and R draws expect R times the sum over all calls: with every call live it is that
    every = sdo(path.route.calls, 4, path.coefficients, generator(), steps_per_sample=path.route.calls)
    eight = plan_of(path, path.route.calls)
    kept = three_stage(path, eight, objective).kept
    for update in range(1, path.route.calls):
        replay(path, kept, update, objective)
    summed = grads(net)
    three_stage(path, every, objective)
    assert close(summed, path.route.calls * grads(net), TOLERANCE[solver])


def test_micro_batches_change_nothing():
    net, path = toy_path(scale=3.0)
    plan, found = plan_of(path, 3, steps_per_sample=2), []
    for micro in (MicroBatches(), MicroBatches(rollout=3, score=1, shortcut=3)):
        kept = three_stage(path, plan, objective, micro=micro).kept
        replay(path, kept, 1, objective, micro=micro, terms=Terms(kl_weight=0.3, proximal=0.5), rescore=True)
        found.append(grads(net))
    assert close(*found, 1e-9)


def shifted_between(path, net):
    """A rollout, then a step: what is kept, and the network's outputs of then by (call, sample)."""
    plan = plan_of(path, 3, steps_per_sample=2)
    kept = three_stage(path, plan, objective).kept
    grads(net)
    moved(net)
    return plan, kept


@torch.no_grad()
def outputs(path, live):
    rows = torch.tensor([call.row for call in live])
    return path.denoise(torch.stack([c.x for c in live]), torch.stack([c.t for c in live]), rows)


def test_what_is_kept_is_what_the_network_gave():
    _, path = toy_path(scale=3.0)
    kept = three_stage(path, plan_of(path, 3), objective).kept
    now = outputs(path, kept.live)
    assert close(torch.stack([call.e for call in kept.live]), now, 1e-12)


def test_a_later_update_against_finite_differences():
    """<sg(w_i g / p_i), e_θ(x_i)> with the rollout's g and inputs, at weights that have moved."""
    net, path = toy_path(scale=3.0)
    _, kept = shifted_between(path, net)
    mine = [call for call in kept.live if call.turn == 1]
    sent = torch.stack([call.factor * kept.g[call.row] for call in mine])
    found = replay(path, kept, 1, objective)
    assert torch.equal(found.g, kept.g) and torch.equal(found.losses, kept.losses)
    check_direction(net, lambda: (sent * outputs(path, mine)).sum(), grads(net))


def test_proximal_against_finite_differences():
    """Beside it the mean over live calls of mean (e_θ - e)², inputs held; and the change is what it says."""
    net, path = toy_path(scale=3.0)
    _, kept = shifted_between(path, net)
    mine = [call for call in kept.live if call.turn == 2]
    before = torch.stack([call.e for call in mine])
    replay(path, kept, 2, objective)
    plain = grads(net)
    found = replay(path, kept, 2, objective, terms=Terms(proximal=0.7))

    def penalty():
        # two live calls a sample, four samples
        return 0.7 * ((outputs(path, mine) - before).square().flatten(1).mean(1) / 2).sum() / 4

    check_direction(net, penalty, grads(net) - plain)
    gap = (outputs(path, mine) - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert torch.allclose(found.changes, gap) and gap.min() > 1e-3


def test_rescore_against_finite_differences():
    """The loss where the path leads by what the calls so far have changed, plus what this update's change from now."""
    net, path = toy_path(scale=3.0)
    _, kept = shifted_between(path, net)
    so_far, mine = ([c for c in kept.live if c.turn <= 1], [c for c in kept.live if c.turn == 1])
    reached = kept.x_N.clone()
    for call, now in zip(so_far, outputs(path, so_far), strict=True):
        # p of one update is a quarter; of the two that are counted, a half
        w = call.factor * (2 / path.route.calls)
        reached[call.row] += w / (4 / path.route.calls) * (now - call.e)
    now = outputs(path, mine)

    def loss():
        x = reached.clone()
        for call, e, held in zip(mine, outputs(path, mine), now, strict=True):
            x[call.row] += call.factor * (e - held)
        return objective(x, path.rows).losses.mean()

    found = replay(path, kept, 1, objective, rescore=True)
    assert torch.allclose(found.x_N, reached, rtol=1e-10)
    assert torch.allclose(found.losses, objective(reached, path.rows).losses)
    check_direction(net, loss, grads(net))


def test_rescored_latents_are_those_of_the_moved_sampler_in_the_mean():
    """Over all calls the estimate is the first-order change with inputs held: exact when every call is counted."""
    net, path = toy_path()
    calls = path.route.calls
    kept = three_stage(path, plan_of(path, calls), objective).kept
    grads(net)
    moved(net)
    found = replay(path, kept, calls - 1, objective, rescore=True)
    expected = kept.x_N.clone()
    for call, e in zip(kept.live, outputs(path, kept.live), strict=True):
        expected[call.row] += path.coefficients.w[call.call] * (e - call.e)
    assert torch.allclose(found.x_N, expected, rtol=1e-9)


# recipes


RECIPE = """
rewards: [colorfulness]
prompts: {lines: [a tiger on the cat, a bus on the dog, a rose on a cat]}
max_train_steps: 7
train_batch_size: 2
solver: ddim
num_inference_steps: 6
guidance_scale: 2.0
learning_rate: 1e-2
checkpointing_steps: 1
lora: {rank: 2}
"""


@pytest.fixture(scope="module")
def recipe(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "mine.yaml"
    path.write_text(f"model: {small('sd15')}" + RECIPE)
    return str(path)


def steps_of(recipe, *overrides):
    return list(train(prepare(load_recipe(recipe, list(overrides)))[0]))


def test_rollouts_are_made_every_so_many_steps(recipe):
    steps = steps_of(recipe, "rollout.updates=3")
    assert [step.replay.update for step in steps] == [1, 2, 3, 1, 2, 3, 1]
    assert [step.calls["no_grad"] for step in steps] == [12, 0, 0, 12, 0, 0, 12]
    assert all(step.calls["grad"] == 2 for step in steps)
    assert [step.replay.change > 0 for step in steps] == [step.replay.update > 1 for step in steps]
    # the rollout's reward, until the next
    assert steps[0].loss == steps[1].loss == steps[2].loss != steps[3].loss
    plain = steps_of(recipe)
    assert steps[0].loss == plain[0].loss and all(step.replay is None for step in plain)
    # the second rollout is of the second batch of prompts and noise
    frozen = [steps_of(recipe, "learning_rate=1e-12", f"rollout.updates={updates}") for updates in (1, 3)]
    assert frozen[1][3].loss == pytest.approx(frozen[0][1].loss, rel=1e-5)


def test_a_rollout_ends_when_the_network_has_changed_too_much(recipe):
    free = steps_of(recipe, "rollout.updates=6")
    limit = free[2].replay.change
    held = steps_of(recipe, "rollout.updates=6", f"rollout.max_change={0.999 * limit}")
    assert [step.replay.update for step in held][:4] == [1, 2, 3, 1]
    assert held[3].loss != held[2].loss
    assert [step.replay.update for step in steps_of(recipe, "rollout.updates=6", "rollout.max_change=1e-9")] == [
        1, 2, 1, 2, 1, 2, 1,
    ]  # fmt: skip


def test_proximal_and_rescore_are_the_recipes(recipe):
    plain = steps_of(recipe, "rollout.updates=3")
    near = steps_of(recipe, "rollout.updates=3", "rollout.proximal=100")
    # the penalty holds the weights where they were
    assert near[0].grad_norm == plain[0].grad_norm and near[1].grad_norm > 2 * plain[1].grad_norm
    again = steps_of(recipe, "rollout.updates=3", "rollout.rescore=true")
    assert again[1].loss != again[0].loss and again[1].calls["no_grad"] == 4 and again[2].calls["no_grad"] == 6


def test_the_cosine_is_that_of_a_fresh_rollout(recipe):
    steps = steps_of(recipe, "rollout.updates=3", "rollout.drift_steps=3")
    assert [step.replay.cosine is not None for step in steps] == [False, False, True, False, False, True, False]
    assert 0.3 < steps[2].replay.cosine < 1
    # looked at, nothing is changed by it
    assert [step.grad_norm for step in steps] == [step.grad_norm for step in steps_of(recipe, "rollout.updates=3")]
    still = steps_of(recipe, "rollout.updates=3", "rollout.drift_steps=3", "learning_rate=1e-12")
    assert still[2].replay.cosine == pytest.approx(1, abs=1e-6)
    # a multiple that falls inside a rollout is looked at in the next
    steps = steps_of(recipe, "rollout.updates=2", "rollout.drift_steps=3")
    assert [step.replay.cosine is not None for step in steps] == [False, True, False, False, False, True, False]


def test_cheap_rollouts_serve_several_updates_too(recipe):
    few = steps_of(recipe, "rollout.updates=2", "rollout.num_inference_steps=3", "rollout.drift_steps=4")
    assert [step.drift is not None for step in few] == [True, False, False, False, True, False, False]
    assert [step.replay.cosine is not None for step in few] == [False, True, False, False, False, True, False]
    assert [step.calls["no_grad"] for step in few][:2] == [6, 0]


def test_a_skipped_step_ends_its_rollout(recipe):
    job = prepare(load_recipe(recipe, ["rollout.updates=3"]))[0]

    def spoilt(g, rollout):
        return g * float("nan") if rollout == 1 else g

    steps = list(train(job, change_g=spoilt))
    assert [(step.replay.update, step.skipped) for step in steps] == [
        (1, False), (2, False), (3, False), (1, True), (1, False), (2, False), (3, False),
    ]  # fmt: skip


REFUSED = {
    "limits alone": (["rollout.max_change=0.1"], "rollout.max_change: is about updates after a rollout's first"),
    "proximal alone": (["rollout.proximal=0.1"], "rollout.proximal: is about updates"),
    "rescore alone": (["rollout.rescore=true"], "rollout.rescore: is about updates"),
    "none": (["rollout.updates=0"], "rollout.updates: must be at least 1"),
    "too many": (["rollout.updates=7"], "7 updates of 1 live call a picture each, and there are 6; write at most 6"),
    "too many of two": (
        ["rollout.updates=4", "gradient.options.steps_per_sample=2"],
        "4 updates of 2 live calls a picture each, and there are 6; write at most 3",
    ),
    "few calls": (["rollout.updates=4", "rollout.num_inference_steps=3"], "there are 3; write at most 3"),
    "chained": (["rollout.updates=2", "gradient.rule=full"], "full chains its steps; use sdo, or write 1"),
    "refl": (["rollout.updates=2", "gradient.rule=refl"], "refl is about one step only"),
    "draft-lv": (["rollout.updates=2", "gradient.rule=draft-lv"], "draft-lv is about one step only"),
    "fixed": (["rollout.updates=2", "gradient.options.step_choice=last"], "step_choice last always takes the same"),
    "weights": (
        ["rollout.updates=2", "rollout.rescore=true", "gradient.options.weights=unit"],
        "rollout.rescore: needs weights true/p, not unit",
    ),
    "drtune": (
        ["rollout.updates=2", "rollout.rescore=true", "gradient.rule=drtune", "gradient.options.k=1"],
        "which drtune does not say",
    ),
    "drtune calls": (
        ["rollout.updates=2", "gradient.rule=drtune"],
        "2 updates of 3 live calls a picture each, and there are 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(recipe, name, tmp_path):
    overrides, text = REFUSED[name]
    done = entry.run(["finetune", "--recipe", recipe, "--out", str(tmp_path / "run"), *overrides])
    assert done.returncode == 2 and text in done.stderr.replace("\n", " "), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plugins_rule_may_share_its_calls_out(recipe):
    @gradient_rule("thirds", summary="each update its own third")
    def thirds(calls, batch, coefficients, generator, *, updates: int = 1):
        mode = torch.full((calls, batch), int(Mode.WEIGHTS))
        turn = (torch.arange(calls) % updates)[:, None].expand(-1, batch)
        return Plan(mode, torch.ones(calls, batch), turn=turn if updates > 1 else None)

    @gradient_rule("forgetful", summary="says nothing of turns")
    def forgetful(calls, batch, coefficients, generator, *, updates: int = 1):
        return thirds(calls, batch, coefficients, generator)

    @gradient_rule("alone", summary="one update")
    def alone(calls, batch, coefficients, generator):
        return thirds(calls, batch, coefficients, generator)

    try:
        assert RULES["thirds"].options == {}
        steps = steps_of(recipe, "rollout.updates=3", "gradient.rule=thirds", "max_train_steps=3")
        assert [step.calls["grad"] for step in steps] == [4, 4, 4]
        with pytest.raises(PluginFault, match="asked for the live calls of 3 updates, and returned no turn"):
            steps_of(recipe, "rollout.updates=3", "gradient.rule=forgetful")
        with pytest.raises(Exception, match="alone takes none"):
            load_recipe(recipe, ["rollout.updates=3", "gradient.rule=alone"])
    finally:
        for name in ("thirds", "forgetful", "alone"):
            del RULES[name]


def test_auto_takes_the_rule_that_can(recipe):
    words = ["gradient.rule=auto", "num_inference_steps=2", "gradient.checkpointing=none"]
    assert load_recipe(recipe, words).recipe.gradient.rule == "full"
    chosen = load_recipe(recipe, [*words, "rollout.updates=2"])
    assert chosen.recipe.gradient.rule == "sdo"
    assert "rollout.updates goes with rules of one step alone" in chosen.notes[0]


# stopped inside a rollout


INSIDE = ["rollout={}", "gradient.options={}", "num_inference_steps=6", "max_train_steps=7", "learning_rate=1e-2"]
# an adapter beside all layers would leave every rollout after a step or two
INSIDE += ["rollout.updates=4", "lora.layers=attention", "lora.rank=8"]
WAYS = {
    "plain": [],
    "limits": ["rollout.max_change=0.02", "rollout.proximal=0.5", "rollout.rescore=true", "rollout.drift_steps=3"],
    "cheap": ["rollout.num_inference_steps=5", "rollout.drift_steps=4", "gradient_accumulation_steps=2"],
    "ema": ["ema_decay=0.9", "mixed_precision=bf16"],
}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_inside_a_rollout_and_resumed(way, tmp_path):
    words = [*UNMEASURED, *INSIDE, *WAYS[way], "checkpointing_steps=1", "-q"]
    whole = tmp_path / "whole"
    assert entry.run(command(whole, *words)).returncode == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    # after these it goes on inside a rollout
    inside = [row["step"] - 1 for row in rows if row["replay"]["update"] > 1]
    folder = tmp_path / "run"
    process = Forked(command(folder, *words[:-1], "--json"))
    lines_until(process, f'"training", "done": {inside[0]}')
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 75, rest
    # a quick machine may have made another update by then, and that one may end a rollout
    for later in (folder / "checkpoints").glob("checkpoint-*"):
        if int(later.name.rpartition("-")[2]) > inside[0]:
            shutil.rmtree(later)
    again = entry.run(command(folder, *words[:-1], "--resume"))
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"resumed from .* \(step (\d) of 7\)", again.stderr)[1]) == inside[0]
    assert learned(folder) == learned(whole)


def learned(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return (
        {name: tensor.float().numpy().tobytes() for name, tensor in weights.items()},
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
    )


@pytest.mark.slow
def test_killed_at_25_moments_inside_rollouts(tmp_path):
    """One run with rollouts of four updates, killed and resumed again and again."""
    seed = int(os.environ.get("SDO_SEED", time.time_ns() % 2**31))
    print(f"\nseed {seed}")
    words = [*UNMEASURED, *INSIDE, *WAYS["limits"], "checkpointing_steps=1"]
    whole, moments, kills, rounds = tmp_path / "whole", random.Random(seed), 0, 0
    assert entry.run(command(whole, *words, "-q")).returncode == 0
    while kills < 25:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        for _ in range(12):
            process = Forked(command(folder, *words, "--json", "--resume"))
            for _, line in zip(range(moments.randint(1, 7)), process.stderr, strict=False):
                del line
            time.sleep(moments.uniform(0, 0.3))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if kills == 25:
                break
        again = entry.run(command(folder, *words, "--resume", "-q"))
        assert again.returncode == 0, again.stderr
        assert learned(folder) == learned(whole)
    print(f"{kills} kills over {rounds} runs")


def test_a_skip_plans_stored_outputs_come_back(recipe, where, tmp_path):  # noqa: F811
    """Live calls of a pruned rollout read what others stored; in a checkpoint too."""
    (where / "inner-run.yaml").write_text(Path(recipe).read_text())
    words = ["rollout.updates=3", "rollout.skip_plan=inner.json", "max_train_steps=3", "-q"]
    base = ["finetune", "--recipe", str(where / "inner-run.yaml")]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert entry.run([*base, "--out", str(whole), *words]).returncode == 0
    assert entry.run([*base, "--out", str(folder), *words, "max_train_steps=2"]).returncode == 0
    found = load_file(folder / "checkpoints" / "checkpoint-2" / "state.safetensors")
    assert any("/kept/" in name for name in found)
    done = entry.run([*base, "--out", str(folder), *words, "--resume"])
    assert done.returncode == 0, done.stderr
    assert learned(folder) == learned(whole)


# several processes


SPLIT = {1: "gradient_accumulation_steps=4", 2: "gradient_accumulation_steps=2", 4: "gradient_accumulation_steps=1"}


@pytest.mark.parametrize("more", [[], ["rollout.max_change=0.02", "rollout.rescore=true"]])
def test_one_two_and_four_processes(tmp_path, more):
    """The same steps, the same ends of rollouts, the same weights up to the order in which they add."""
    found = {}
    for size in (1, 2, 4):
        words = [*TINY, *UNMEASURED, *INSIDE, "train_batch_size=1", SPLIT[size], "-q", *more]
        done = run_by(tmp_path / str(size), *words, size=size)
        assert done.returncode == 0, done.stderr
        found[size] = learned(tmp_path / str(size))
    for size in (2, 4):
        for mine, theirs in zip(found[1][1], found[size][1], strict=True):
            assert mine["replay"]["update"] == theirs["replay"]["update"] and mine["calls"] == theirs["calls"]
            assert mine["replay"]["change"] == pytest.approx(theirs["replay"]["change"], rel=1e-2, abs=1e-6)
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_a_run_inside_a_rollout_goes_on_with_other_processes(tmp_path):
    words = [*TINY, *UNMEASURED, *INSIDE, "train_batch_size=1", "checkpointing_steps=2"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run_by(whole, *words, SPLIT[1], "-q", size=1).returncode == 0
    assert run_by(folder, *words, SPLIT[2], "max_train_steps=6", "-q", size=2).returncode == 0
    done = run_by(folder, *words, SPLIT[1], "--resume", size=1)
    assert done.returncode == 0 and "(step 6 of 7)" in done.stderr, done.stderr
    one, other = learned(whole)[1], learned(folder)[1]
    assert other[-1]["replay"]["update"] == 3
    assert other[-1]["grad_norm"] == pytest.approx(one[-1]["grad_norm"], rel=1e-3)
