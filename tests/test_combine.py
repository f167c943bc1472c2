"""Several rewards: their running spread, their gradients, and rules for conflicts, against references in float64."""

import itertools
import json
import math
import signal

import entry
import numpy as np
import pytest
import torch
from forked import Forked
from test_checkpoints import TINY, UNMEASURED, lines_until
from test_parallel import run as run_by

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import CombineSpec, SightSpec
from sdo_cli.training.conflict import added, least, looked_at, projected, shares
from sdo_cli.training.loop import train
from sdo_cli.training.objective import RewardObjective, WeightedReward
from sdo_cli.training.prepare import prepare
from sdo_cli.training.spreads import DECAY, Spreads

TWO = ["rewards=[clip,aesthetic]", *UNMEASURED]
SMALL = ["train_batch_size=2", "num_inference_steps=2", "max_train_steps=3", "rollout={}", *UNMEASURED]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the running spread


def test_spread_is_that_of_all_batches_fading():
    spreads, batches = Spreads(), [7 + 3 * drawn(16, seed=seed).float() for seed in range(6)]
    for batch in batches:
        spreads.add({"r": batch})
    weights = np.repeat([DECAY ** (5 - k) for k in range(6)], 16)
    values = torch.cat(batches).double().numpy()
    mean = np.average(values, weights=weights)
    wanted = math.sqrt(np.average((values - mean) ** 2, weights=weights))
    assert spreads.of("r") == pytest.approx(wanted, rel=1e-9)
    assert spreads.of("another") == 1.0


def test_a_reward_that_never_changes_is_divided_by_one():
    spreads = Spreads()
    spreads.add({"r": torch.full((8,), 21.3), "zero": torch.zeros(4)})
    assert (spreads.of("r"), spreads.of("zero")) == (1.0, 1.0)


def test_spreads_go_through_json_bit_for_bit():
    spreads, other = Spreads(), Spreads()
    for seed in range(3):
        spreads.add({"a": drawn(5, seed=seed), "b": drawn(5, seed=9 + seed)})
    other.load_state(json.loads(json.dumps(spreads.state())))
    for each in (spreads, other):
        each.add({"a": drawn(5, seed=7), "b": drawn(5, seed=8)})
    assert other.state() == spreads.state()


# conflicts


def pcgrad(gradients):
    """The paper's algorithm 1 for one sample, word by word."""
    total = np.zeros_like(gradients[0])
    for i, g in enumerate(gradients):
        mine = g.copy()
        for j in [(i + s) % len(gradients) for s in range(1, len(gradients))]:
            if mine @ gradients[j] < 0:
                mine = mine - mine @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += mine
    return total


@pytest.mark.parametrize("number", [2, 3, 4])
def test_projection_is_the_papers(number):
    g = drawn(number, 20, 5, seed=number)
    for row in range(20):
        assert np.allclose(projected(g)[row].numpy(), pcgrad(g[:, row].numpy()), atol=1e-12)


def test_what_agrees_is_added_and_what_is_not_there_is_against_nothing():
    g = drawn(2, 4, 6).abs()
    assert torch.equal(projected(g), added(g))
    none = torch.stack((g[0], torch.zeros_like(g[0])))
    for rule in (projected, added):
        assert torch.equal(rule(none), g[0])
    # left out where it is zero, and the rest counted for as many
    assert torch.allclose(least(none), g[0])
    assert torch.equal(least(torch.zeros(2, 3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_shortest_vector_is_that_of_a_search(number):
    """Against scipy's constrained minimiser, and the condition of the optimum: no gradient is shorter along it."""
    from scipy.optimize import minimize

    g = drawn(number, 12, 5, seed=10 + number) + 0.5
    gram = torch.einsum("krd,lrd->rkl", g, g)
    alpha = shares(gram)
    assert torch.allclose(alpha.sum(1), torch.ones(12, dtype=torch.float64)) and bool((alpha >= 0).all())
    for row in range(12):
        G = gram[row].numpy()
        found = minimize(
            lambda a, G=G: a @ G @ a,
            np.full(number, 1 / number),
            bounds=[(0, 1)] * number,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-14},
        )
        mine = alpha[row].numpy()
        assert mine @ G @ mine == pytest.approx(found.fun, rel=1e-5, abs=1e-9)
        assert bool((G @ mine >= mine @ G @ mine - 1e-9).all())
    along = least(g)
    # nobody gets worse
    assert bool((torch.einsum("krd,rd->kr", g, along) >= -1e-9).all())


def test_two_gradients_have_the_closed_form():
    a, b = drawn(2, 30, 4, seed=3)
    t = ((b - a) * b).sum(1) / (a - b).square().sum(1)
    t = t.clamp(0, 1).unsqueeze(1)
    assert torch.allclose(least(torch.stack((a, b))), 2 * (t * a + (1 - t) * b))


def test_equal_gradients_give_their_sum():
    g = drawn(1, 5, 6).expand(3, 5, 6)
    for rule in (added, projected, least):
        assert torch.allclose(rule(g), 3 * g[0])


def test_lengths_and_cosines():
    a, b = drawn(2, 4, 3, 2, 2, seed=5).float()
    found = looked_at({"a": a, "b": b, "c": 0 * a})
    assert list(found) == ["a", "b", "c", "a|b", "a|c", "b|c"]
    assert torch.allclose(found["a"], a.flatten(1).norm(dim=1))
    assert torch.allclose(found["a|b"], torch.cosine_similarity(a.flatten(1), b.flatten(1)))
    assert not found["a|c"].any()


# the objective


class Decoder:
    """x² and a shift: a decoder with a gradient of its own."""

    @staticmethod
    def decode(x):
        return 0.3 * x.square() + 0.2


class Linear:
    def __init__(self, seed, power=1):
        self.direction, self.power = drawn(3, 4, 4, seed=seed), power

    def score(self, images, prompts):
        return (images * self.direction).flatten(1).sum(1) ** self.power


def objective_of(**changes):
    items = [WeightedReward("a", Linear(1, 2), 1.0), WeightedReward("b", Linear(2), 0.5)]
    return RewardObjective(Decoder, items, ["x", "y", "z"], **changes)


def gradient(objective, x):
    leaf = x.clone().requires_grad_()
    scored = objective(leaf, torch.arange(len(x)))
    (g,) = torch.autograd.grad(scored.losses.sum(), leaf)
    return scored, g


def test_looking_at_gradients_changes_no_value_and_no_gradient():
    x = drawn(3, 3, 4, 4)
    plain, g = gradient(objective_of(), x)
    looked = objective_of(combine=CombineSpec(measure=True))
    scored, same = gradient(looked, x)
    # added up in float32, as training does
    assert torch.allclose(scored.losses, plain.losses) and torch.allclose(same, g, atol=1e-4 * g.abs().max())
    assert [list(piece) for piece in looked.looks] == [["a", "b", "a|b"]]
    assert torch.equal(scored.rewards["a"], plain.rewards["a"])


@pytest.mark.parametrize(("name", "rule"), [("projection", projected), ("mgda", least)])
def test_a_rule_is_taken_at_the_pictures_and_sent_back_through_the_decoder(name, rule):
    x = drawn(3, 3, 4, 4, seed=4)
    scored, found = gradient(objective_of(combine=CombineSpec(conflict=name)), x)
    images = Decoder.decode(x)
    gradients = []
    for item in objective_of().rewards:
        leaf = images.clone().requires_grad_()
        loss = item.loss_of(item.reward.score(leaf, []).float())
        gradients.append(torch.autograd.grad(loss.sum(), leaf)[0].flatten(1))
    wanted = rule(torch.stack(gradients)).view_as(x) * 0.6 * x
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert torch.allclose(scored.losses, gradient(objective_of(), x)[0].losses)


def test_weights_are_divided_by_the_spread():
    x = drawn(3, 3, 4, 4, seed=4)
    spread = {"a": 4.0, "b": 0.25}
    scored, _ = gradient(objective_of(spread=spread.get), x)
    wanted = -(scored.rewards["a"] / 4 + 0.5 * scored.rewards["b"] / 0.25)
    assert torch.allclose(scored.losses, wanted.double(), rtol=1e-5)


def test_without_a_graph_it_only_scores():
    x = drawn(3, 3, 4, 4)
    objective = objective_of(combine=CombineSpec(conflict="mgda"), sight=SightSpec(sharpness=0.1))
    with torch.no_grad():
        scored = objective(x, torch.arange(3))
    assert torch.allclose(scored.losses, gradient(objective_of(), x)[0].losses) and not objective.looks


# training


def steps_of(*words):
    job, _ = prepare(load_recipe("quickstart", [*SMALL, "rewards=[clip,aesthetic]", *words]))
    return list(train(job)), job


def test_the_first_step_is_divided_by_its_own_spread():
    steps, job = steps_of("combine.normalise=spread", "train_batch_size=4")
    plain, _ = steps_of("train_batch_size=4")
    # drawn once more, so its rewards are those without
    assert steps[0].rewards == plain[0].rewards
    first = steps[0].spreads
    assert set(first) == {"clip-embedded", "aesthetic-embedded"} and 1.0 not in first.values()
    loss = -sum(steps[0].rewards[name] / first[name] for name in first)
    assert steps[0].loss == pytest.approx(loss, rel=1e-5)
    assert steps[1].spreads == first != steps[2].spreads and job.spreads.steps == 3
    assert plain[0].spreads is None and plain[0].gradients is None


def test_spreads_of_the_start_are_kept(monkeypatch):
    """Those of two batches, looked at before the first step; running ones go on changing. Also where a run goes on."""
    monkeypatch.setattr("sdo_cli.training.prepare.AT_START", 8)
    kept, job = steps_of("combine.normalise=spread-at-start", "train_batch_size=4", "max_train_steps=4")
    running, _ = steps_of("combine.normalise=spread", "train_batch_size=4", "max_train_steps=4")
    plain, _ = steps_of("train_batch_size=4")
    first = kept[0].spreads
    assert all(step.spreads == first for step in kept) and kept[0].rewards == plain[0].rewards
    assert running[0].spreads != first and running[2].spreads != running[3].spreads
    assert (job.spreads.steps, job.spreads.samples) == (2, 8)
    again = Spreads(8)
    again.load_state(job.spreads.state())
    again.add({name: torch.tensor([0.0, 9.0]) for name in first})
    assert {name: again.of(name) for name in first} == first


def test_equal_weights_pull_equally_once_divided():
    """aesthetic-embedded is worth a hundred times clip-embedded in plain numbers."""
    looked, _ = steps_of("combine.measure=true", "train_batch_size=8")
    even, _ = steps_of("combine.measure=true", "combine.normalise=spread", "train_batch_size=8")

    def ratio(step):
        a, b = (step.gradients[name] for name in ("aesthetic-embedded", "clip-embedded"))
        return max(a, b) / min(a, b)

    assert -1 <= looked[0].gradients["clip-embedded|aesthetic-embedded"] <= 1
    assert ratio(even[0]) < ratio(looked[0])


@pytest.mark.parametrize(
    "words",
    [["combine.conflict=projection"], ["combine.normalise=spread"], ["combine.normalise=spread-at-start"]],
    ids=str,
)
def test_killed_and_resumed_it_is_what_it_would_have_been(words, tmp_path):
    def metrics(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    run = ["finetune", "--recipe", "quickstart", *TINY, *TWO, *words, "sight.crop=0.2", "-q", "--out"]
    whole = entry.run([*run, tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr
    part = Forked([word if word != "-q" else "--json" for word in map(str, [*run, tmp_path / "part"])])
    seen = "".join(lines_until(part, '"training", "done": 3'))
    assert ("draws and scores 64 pictures before the first step" in seen) == ("spread-at-start" in words[0])
    part.send_signal(signal.SIGKILL)
    part.communicate(60)
    again = entry.run([word for word in [*run, tmp_path / "part", "--resume"] if word != "-q"])
    assert again.returncode == 0 and "before the first step" not in again.stderr, again.stderr
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert (tmp_path / "part" / "pytorch_lora_weights.safetensors").read_bytes() == (
        tmp_path / "whole" / "pytorch_lora_weights.safetensors"
    ).read_bytes()


def test_two_processes_divide_by_the_same(tmp_path):
    words = [*TINY, *TWO, "combine.normalise=spread", "combine.conflict=projection", "sight.noise=0.05", "-q"]
    words = [word for word in words if not word.startswith(("train_batch_size", "max_train_steps"))]
    words += ["max_train_steps=2"]
    base = ["finetune", "--recipe", "quickstart"]
    one = entry.run([*base, "--out", tmp_path / "one", *words, "train_batch_size=2", "gradient_accumulation_steps=2"])
    assert one.returncode == 0, one.stderr
    two = run_by(tmp_path / "two", *words, "train_batch_size=2")
    assert two.returncode == 0, two.stderr
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert rows[0][0]["spreads"] == rows[1][0]["spreads"]
    assert rows[0][0]["gradients"] == rows[1][0]["gradients"]
    assert rows[0][1]["spreads"] == pytest.approx(rows[1][1]["spreads"], rel=1e-5)


WRONG = [
    (["combine.conflict=mgda"], "combine.conflict: is about several rewards"),
    (["combine.measure=true"], "combine.measure: is about several rewards"),
    ([*TWO, "combine.conflict=pcgrad"], "combine.conflict"),
    ([*TWO, "combine.conflict=projection", "mixed_precision=fp16"], "vanish in fp16"),
    ([*TWO, "combine.normalise=spread", "train_batch_size=1"], "one sample a step has no spread"),
    (["sight.crop=1"], "sight.crop: must be a share from 0 to 0.9"),
    (["sight.jpeg=96"], "sight.jpeg: is the lowest quality"),
    (["sight.noise=2"], "sight.noise: is of pixels"),
    (["sight.sharpness=-1"], "sight.sharpness: must not be negative"),
    (["sight.sharpness=nan"], "sight.sharpness: must not be negative"),
    (["sight.views=3"], "sight.views: are all the same picture"),
    (["sight.crop=0.1", "sight.lower_bound=1"], "sight.lower_bound: needs the spread of several views"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[" ".join(words[-2:]) for words, _ in WRONG])
def test_what_does_not_go_together_is_said(words, sentence):
    with pytest.raises(RecipeFault) as fault:
        load_recipe("quickstart", [*words])
    assert sentence in str(fault.value)


def test_the_rules_differ_where_rewards_do():
    """All pairs of rules give other weights after a step of two rewards that pull apart."""
    found = {
        rule: steps_of(f"combine.conflict={rule}", "max_train_steps=1")[1].parameters[1].detach().clone()
        for rule in ("none", "projection", "mgda")
    }
    for a, b in itertools.combinations(found.values(), 2):
        assert not torch.equal(a, b)
