"""Plans of segments: branches of a network, genes, the evolution, and the command."""

import json
import os
from dataclasses import replace

import entry
import pytest
import torch
from test_skipping import CHAIN

from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.prune.baselines import deep_cache, every, uniform
from sdo_cli.prune.segments import Evolution, SegmentSettings, branches, evolve, lengths, runs_of
from sdo_cli.prune.setting import Setting
from sdo_cli.skipping.liveness import Wiring
from sdo_cli.skipping.skip_plan import load_plan

# a UNet of two levels: down 0, down 1, middle, up 0 reads down 1, up 1 reads down 0
UNET = Wiring(
    ("down0", "down1", "mid", "up0", "up1"),
    (frozenset(), frozenset({0}), frozenset({1}), frozenset({2, 1}), frozenset({3, 0})),
    frozenset({4}),
    False,
)
SHARES = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)


@pytest.fixture(scope="module")
def setting(small):
    family = load_family(ModelSource(str(small("sd15"))), dtype=torch.float32)
    settings = DrawSettings("ddim", num_inference_steps=12, guidance_scale=2.0)
    prompts = ["the cat", "a dog on the cat", "the dog"]
    return Setting(family, ModelSource(str(small("sd15"))), PromptEmbeddings(family), settings, prompts)


def test_branches_are_the_skip_connections_outermost_first():
    assert branches(UNET, SHARES) == [frozenset({0, 4}), frozenset({0, 1, 3, 4}), frozenset(range(5))]


def test_a_chain_has_no_branch_beside_the_whole():
    assert branches(CHAIN, torch.full((len(CHAIN.units),), 0.1)) == [frozenset(range(len(CHAIN.units)))]


def test_a_segment_is_whole_then_a_branch_then_nothing():
    ways = branches(UNET, SHARES)
    runs = runs_of(((0, 1), (1, 3), (0, 2)), 12, ways, UNET)
    names = ["".join("01"[done] for done in row) for row in runs.tolist()]
    empty = "00000"
    assert names == ["11111", empty, empty, empty, "11111", "11011", "11011", empty, "11111", "10001", empty, empty]
    assert lengths(12, 3) == [4, 4, 4] and sum(lengths(50, 7)) == 50


@pytest.mark.parametrize("segments", [1, 3, 5, 12])
def test_no_partial_call_is_uniform_reuse_and_all_of_the_outermost_are_deepcache(setting, segments):
    """Bit for bit the plans of the baselines with as many whole calls."""
    wiring, budget, ways = setting.wiring, setting.budget, branches(setting.wiring, setting.budget.shares)
    none = runs_of(((0, 1),) * segments, 12, ways, wiring)
    ratio = 1 - segments / 12
    assert torch.equal(none, uniform(ratio, 12, wiring, budget))
    every_one = runs_of(tuple((0, length) for length in lengths(12, segments)), 12, ways, wiring)
    assert torch.equal(every_one, deep_cache(1 - budget.kept(every_one), 12, wiring, budget))
    assert every_one.all(1).tolist() == every(12, segments).tolist()


def evolution_of(setting, **wanted):
    return Evolution(setting, replace(SegmentSettings(3, 5, 2, "l2"), **wanted), [0.4, 0.7])


def test_the_evolution_comes_nearer_and_is_the_same_again(setting):
    found = evolution_of(setting, generations=6)
    begun = next(evolve(found))
    first = {ratio: begun.drawn[begun.best(ratio)][1] for ratio in begun.ratios}
    state = json.loads(json.dumps(found.state()))
    for _ in evolve(found):
        pass
    for ratio in found.ratios:
        kept, distance = found.drawn[found.best(ratio)]
        assert kept <= 1 - ratio + 1e-9 and distance <= first[ratio]
    assert any(found.drawn[found.best(ratio)][1] < first[ratio] for ratio in found.ratios)
    # the ends were among the first
    assert ((0, 1),) * 7 in found.drawn and len(found.drawn) > 20
    again = evolution_of(setting, generations=6)
    again.go_on(state)
    for _ in evolve(again):
        pass
    assert again.drawn == found.drawn and list(again.drawn) == list(found.drawn)
    front = found.front()
    assert [kept for _, kept, _ in front] == sorted(kept for _, kept, _ in front)
    assert [d for *_, d in front] == sorted((d for *_, d in front), reverse=True)


def test_a_generation_has_no_candidate_twice_and_all_fit_their_budget(setting):
    found = evolution_of(setting)
    for _ in evolve(found):
        pass
    assert all(kept <= 0.6 + 1e-9 for kept, _ in found.drawn.values())
    assert not set(found.children()) & set(found.drawn)


def test_prune_by_segments(small, tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"a {name} on the cat\n" for name in ("tiger", "bus", "dog", "rose")))
    words = (
        "prune", "-p", "mine.txt", "--method", "segments", "-m", str(small("sd15")), "--steps", "6", "--guidance", "2",
        "--ratio", "0.5", "--updates", "2", "--population", "3", "--search-batch", "2", "--num-prompts", "2",
        "--no-controls", "--rounds", "1", "--batch-size", "2",
    )  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = entry.run([*words, "--out", "one"], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "one/plan-0.50.json")
    assert plan.cost["kept"] <= 0.5 and plan.made_by["segments"] and plan.made_by["method"] == "segments"
    tree = json.loads((tmp_path / "one/front.json").read_text())
    assert tree["front"][0]["kept"] <= 0.5 and tree["branches"][0] == ["down_blocks.0", "up_blocks.1"]
    bad = entry.run([*words, "--population", "0", "--out", "two"], cwd=tmp_path, env=env)
    assert bad.returncode == 2 and "--population: must be at least 1" in bad.stderr
