"""`kl_gate`: only pictures that rewards are uncertain about are held near the base."""

import dataclasses
import json

import entry
import pytest
import torch
from test_checkpoints import TINY, UNMEASURED, command
from test_combine import Decoder, Linear, drawn, steps_of
from test_gradients import check_direction, close, in_one_graph, plan_for, record
from test_parallel import run as run_by
from test_replay import INSIDE, learned, plan_of
from toy import grads, objective, toy_path

from rewards.mixture import Mixture
from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.replay import replay
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import SightSpec
from sdo_cli.training.objective import RewardObjective, WeightedReward
from sdo_cli.training.replays import Replays
from sdo_cli.training.sight import Sight

# of the toy's four samples, the second and the last are over 0.3
DOUBTS = torch.tensor([0.1, 0.5, 0.3, 0.4], dtype=torch.float64)
GATE = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
HELD = Terms(kl_weight=0.7)
GATED = dataclasses.replace(HELD, kl_gate=0.3)


def doubtful(x_N, rows):
    return dataclasses.replace(objective(x_N, rows), uncertainty=DOUBTS[rows])


def test_the_gated_penalty_against_finite_differences():
    """Σ gate · mean over the live calls of mean (ε_θ - ε_base)² / batch, gate and inputs held."""
    net, path = toy_path("ddim", scale=2.0)
    plan, kept = plan_for("sdo-3", path), record(path)

    @torch.no_grad()
    def penalty():
        total = torch.zeros(4, dtype=torch.float64)
        for i, (x, t, _) in enumerate(kept):
            gap = (path.denoise(x, t, path.rows) - path.base(x, t, path.rows)).square().flatten(1).mean(1)
            total += GATE * gap * plan.live[i] / 3
        return total

    run_plan(path, plan, doubtful)
    plain = grads(net)
    outcome = run_plan(path, plan, doubtful, terms=GATED, micro=MicroBatches(shortcut=5))
    assert torch.allclose(outcome.penalties.double(), penalty()) and torch.equal(outcome.uncertainty, DOUBTS)
    check_direction(net, lambda: 0.7 * penalty().sum() / 4, grads(net) - plain)


@pytest.mark.parametrize("variant", ["sdo", "draft-lv", "refl", "drtune"])
def test_both_engines_hold_the_same_samples(variant):
    net, path = toy_path("ddim-v", scale=3.0)
    plan = plan_for(variant, path)
    three = run_plan(path, plan, doubtful, terms=GATED)
    by_stages = grads(net)
    one = in_one_graph(path, plan, GATED, target=doubtful)
    assert close(by_stages, grads(net), 1e-9)
    assert torch.allclose(three.penalties, one.penalties.to(three.penalties))
    assert bool((three.penalties > 0).equal(GATE > 0))


def test_open_it_is_what_it_was_and_closed_there_is_no_penalty():
    net, path = toy_path("ddim", scale=2.0)
    plan = plan_for("sdo-3", path)
    run_plan(path, plan, doubtful, terms=HELD)
    ungated = grads(net)
    run_plan(path, plan, doubtful, terms=dataclasses.replace(HELD, kl_gate=0.05))
    assert torch.equal(grads(net), ungated)
    run_plan(path, plan, doubtful)
    free = grads(net)
    asked = []
    path = dataclasses.replace(path, base=lambda x, t, rows: asked.append(1))
    outcome = run_plan(path, plan, doubtful, terms=dataclasses.replace(HELD, kl_gate=0.5))
    assert torch.equal(grads(net), free) and not outcome.penalties.any() and not asked
    with pytest.raises(ValueError, match="says how uncertain it is"):
        run_plan(path, plan, objective, terms=GATED)


def test_later_updates_keep_the_rollouts_gate_and_checkpoints_keep_it():
    net, path = toy_path(scale=3.0)
    plan = plan_of(path, 3)
    kept = three_stage(path, plan, doubtful, terms=GATED).kept
    grads(net)
    found = replay(path, kept, 1, objective, terms=GATED)
    mine = grads(net)
    assert (found.penalties > 0).equal(GATE > 0)
    state = Replays(slices={0: kept}).state()
    again = Replays()
    again.take_slices(state, {0: plan}, torch.device("cpu"))
    replay(path, again.slices[0], 1, objective, terms=GATED)
    assert torch.equal(grads(net), mine)
    # scored again, it is asked again
    found = replay(path, kept, 1, doubtful, terms=GATED, rescore=True)
    assert torch.equal(found.uncertainty, DOUBTS)


def generator_of(row, view):
    return torch.Generator().manual_seed(100 * row + view)


def uncertainty_of(items, x, **changes):
    found = RewardObjective(Decoder, items, ["x", "y", "z"], **changes)(x, torch.arange(3))
    return found.uncertainty


def test_uncertainty_is_the_spread_of_views_and_of_the_parts_of_a_mixture():
    x = drawn(3, 3, 4, 4).float()
    a, b = Linear(1), Linear(2)
    a.direction, b.direction = a.direction.float(), b.direction.float()
    mixture = Mixture({"a": (a, 2.0, 0.5, 3.0), "b": (b, -1.0, 0.0, 2.0)})
    images, look = Decoder.decode(x), SightSpec(views=3, noise=0.1)
    views = [Sight(noise=0.1)(images, generator_of, [0, 1, 2], view) for view in range(3)]
    over_views = torch.stack([a.score(view, []) for view in views]).var(0, correction=0)
    found = uncertainty_of([WeightedReward("a", a, -0.5)], x, sight=look, draw=generator_of, spread=lambda name: 4.0)
    assert torch.allclose(found, 0.5 / 4 * over_views.sqrt(), rtol=1e-4)

    def among(pictures):
        # normalised as the mixture does, turned as it counts, in shares of 2 : 1
        z = torch.stack([(a.score(pictures, []) - 0.5) / 3, -b.score(pictures, []) / 2])
        share = torch.tensor([[2.0], [1.0]]) / 3
        return 9 * (share * (z - (share * z).sum(0)).square()).sum(0)

    assert torch.allclose(uncertainty_of([WeightedReward("m", mixture, 1.0)], x), among(images).sqrt(), rtol=1e-4)
    mixed = torch.stack([mixture.score(view, []) for view in views]).var(0, correction=0)
    both = (mixed + torch.stack([among(view) for view in views]).mean(0)).sqrt()
    found = uncertainty_of([WeightedReward("m", mixture, 1.0)], x, sight=look, draw=generator_of)
    assert torch.allclose(found, both, rtol=1e-4)
    two = [WeightedReward("m", mixture, 1.0), WeightedReward("a", a, -0.5)]
    summed = both + 0.5 * over_views.sqrt()
    assert torch.allclose(uncertainty_of(two, x, sight=look, draw=generator_of), summed, rtol=1e-4)
    assert uncertainty_of([WeightedReward("a", a, 1.0)], x) is None


SEEN = ["rewards=[clip]", "sight={views: 3, crop: 0.3}", "kl_weight=50", "train_batch_size=4", "learning_rate=1e-2"]


def test_metrics_say_how_uncertain_and_how_many():
    open_, job = steps_of(*SEEN)
    first = open_[0].gate
    assert first["share"] == 1 and 0 < first["uncertainty"] < first["highest"]
    # between mean and highest: some of the four
    middle = (first["uncertainty"] + first["highest"]) / 2
    some, _ = steps_of(*SEEN, f"kl_gate={middle}")
    assert 0 < some[0].gate["share"] < 1 and some[0].gate["uncertainty"] == first["uncertainty"]
    least, same = steps_of(*SEEN, "kl_gate=1e-30")
    assert all(torch.equal(a, b) for a, b in zip(job.parameters, same.parameters, strict=True))
    assert least[0].gate == first
    none, closed = steps_of(*SEEN, "kl_gate=1000")
    _, free = steps_of(*SEEN, "kl_weight=0")
    assert none[0].gate["share"] == 0 and none[2].penalty == 0
    assert all(torch.equal(a, b) for a, b in zip(closed.parameters, free.parameters, strict=True))
    assert not torch.equal(closed.parameters[1], job.parameters[1])
    assert steps_of("rewards=[clip]", "kl_weight=1")[0][0].gate is None


def test_stopped_inside_a_rollout_and_resumed(tmp_path):
    words = [
        *UNMEASURED,
        *INSIDE,
        *SEEN,
        "train_batch_size=2",
        "kl_gate=0.01",
        "checkpointing_steps=2",
        "lr_scheduler=constant",
    ]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert entry.run(command(whole, *words, "-q")).returncode == 0
    assert entry.run(command(folder, *words, "max_train_steps=6", "-q")).returncode == 0
    again = entry.run(command(folder, *words, "--resume"))
    assert again.returncode == 0 and "(step 6 of 7)" in again.stderr, again.stderr
    assert learned(folder) == learned(whole)
    assert learned(whole)[1][0]["gate"]["uncertainty"] > 0


def test_two_processes_hold_the_same_pictures(tmp_path):
    words = [*TINY, *UNMEASURED, *SEEN, "train_batch_size=1", "max_train_steps=2", "-q"]
    rows = []
    for size, split in ((1, 2), (2, 1)):
        folder = tmp_path / str(size)
        done = run_by(folder, *words, f"gradient_accumulation_steps={split}", size=size)
        assert done.returncode == 0, done.stderr
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert rows[0][0]["gate"] == rows[1][0]["gate"]
    assert rows[0][1]["penalty"] == pytest.approx(rows[1][1]["penalty"], rel=1e-3)


WRONG = [
    (["kl_gate=0.1", "sight={views: 2, crop: 0.1}"], "kl_gate: is about whom kl_weight holds"),
    (["kl_gate=0.1", "kl_weight=1"], "kl_gate: needs rewards that say how uncertain they are"),
    (["kl_gate=0.1", "kl_weight=1", "sight.crop=0.1"], "kl_gate: needs rewards that say"),
    (["kl_gate=0.1", "kl_weight=1", "rewards=[{name: mixture, options: {parts: [{name: clip}]}}]"], "kl_gate: needs"),
    (["kl_gate=-1"], "kl_gate: must not be negative"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[" ".join(words[:3]) for words, _ in WRONG])
def test_what_does_not_go_together_is_said(words, sentence):
    with pytest.raises(RecipeFault) as fault:
        load_recipe("quickstart", words)
    assert sentence in str(fault.value)
    parts = "rewards=[{name: mixture, options: {parts: [{name: clip}, {name: aesthetic}]}}]"
    assert load_recipe("quickstart", ["kl_gate=0.1", "kl_weight=1", parts]).recipe.kl_gate == 0.1
