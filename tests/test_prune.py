"""The search for what to skip: gates and their gradients, ratios, baselines, measures, and the command."""

import json
import os
import signal
import time
from dataclasses import replace

import entry
import forked
import numpy as np
import pytest
import torch
from PIL import Image
from test_skipping import CHAIN, Bench

from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import skips_of
from sdo_cli.estimate.units import decode_flops, unit_flops
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.progress import Silent
from sdo_cli.prune.baselines import deep_cache, every, random_gates, uniform
from sdo_cli.prune.caching import soft_gates
from sdo_cli.prune.gated import gated_call, gated_latents
from sdo_cli.prune.gates import PRUNERS, straight_through
from sdo_cli.prune.less_guidance import at_their_guidance
from sdo_cli.prune.measure import measure
from sdo_cli.prune.methods import METHODS, controls, from_schedule, schedules
from sdo_cli.prune.ratios import Budget, runs_at
from sdo_cli.prune.search import (
    DISTANCES,
    SearchSettings,
    full_update,
    l2c_update,
    one_step_update,
    search,
    shortcut_update,
)
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.ssim import ssim
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.seeding import key_to_seed
from sdo_cli.skipping.liveness import live
from sdo_cli.skipping.skip_plan import load_plan

PROMPTS = ["the cat", "a dog on the cat", "the dog"]


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1"})


# similarity


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure as reference

    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 40, 33, generator=generator, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    # it also counts windows over a reflected border; those inside the image are the published measure's
    maps = [reference(x[None], y[None], data_range=1.0, return_full_image=True)[1] for x, y in zip(a, b, strict=True)]
    wanted = torch.stack([found[..., 5:-5, 5:-5].mean() for found in maps])
    assert (ssim(a, b) - wanted).abs().max() < 1e-9
    assert ssim(a, a).sub(1).abs().max() < 1e-12


def test_ssim_has_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 12, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.rand(1, 1, 12, 12, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ssim(x, b), (a,))


# gates


def test_gates_are_hard_forward_and_soft_backward():
    ahead = torch.tensor([[9.0, 9.0], [0.3, -2.0], [-1e-3, 4.0]], dtype=torch.float64, requires_grad=True)
    gates = straight_through(ahead)
    assert gates.tolist() == [[1, 1], [1, 0], [0, 1]]
    gates.sum().backward()
    soft = torch.softmax(torch.stack([ahead, torch.zeros_like(ahead)]), 0)[0]
    wanted = soft * (1 - soft)
    # the first call computes everything whatever its logits
    wanted[0] = 0
    assert torch.allclose(ahead.grad, wanted.detach())


@pytest.mark.parametrize("name", PRUNERS)
def test_a_fresh_pruner_keeps_everything(name):
    assert bool((PRUNERS[name](7, 5)() > 0.5).all())


def test_a_pruner_starts_the_same_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = PRUNERS["attention"](7, 5), PRUNERS["attention"](7, 5)
    assert torch.equal(first(), second()) and torch.equal(torch.get_rng_state(), before)


# gradients of gates


@pytest.fixture(scope="module")
def setting64(small):
    """A small UNet in float64, four steps."""
    source = ModelSource(str(small("sd15")))
    family = load_family(source, dtype=torch.float64)
    family.to(torch.device("cpu"), torch.float64)
    settings = DrawSettings("ddim", num_inference_steps=4, guidance_scale=3.0)
    return Setting(family, source, PromptEmbeddings(family), settings, PROMPTS)


@pytest.fixture
def in_float64(monkeypatch):
    """Noise is drawn in float32 and images decoded to it: both as float64 here."""
    import sdo_cli.models.family as family_module
    import sdo_cli.prune.setting as setting_module

    drawn = setting_module.draw_noise
    monkeypatch.setattr(setting_module, "draw_noise", lambda *a: replace(n := drawn(*a), initial=n.initial.double()))

    def decode(self, latents):
        return (self.vae.decode(self._to_vae_scale(latents), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    monkeypatch.setattr(family_module.DiffusersFamily, "decode", decode)


def differences(value_of, gates, entries, step=1e-5):
    found = {}
    for place in entries:
        shifted = []
        for sign in (1, -1):
            moved = gates.clone()
            moved[place] += sign * step
            shifted.append(value_of(moved))
        found[place] = (shifted[0] - shifted[1]) / (2 * step)
    return found


def some_gates(setting, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(setting.calls, len(setting.wiring.units), generator=generator, dtype=torch.float64)
    return torch.cat([torch.ones_like(gates[:1]), gates[1:].round()])


def test_full_gradients_are_those_of_finite_differences(setting64, in_float64):
    """Of every distance, each moved image decoded once."""
    path = setting64.update_path(0, 1)
    full = setting64.family.decode(sample_latents(path))

    @torch.no_grad()
    def values_of(moved):
        x_N = gated_latents(path, setting64.family.skippable("blocks"), setting64.wiring.units, moved)
        images = setting64.family.decode(x_N)
        return torch.stack([distance(images, full).mean() for distance in DISTANCES.values()])

    entries = [(1, 0), (1, 4), (2, 2), (3, 1), (3, len(setting64.wiring.units) - 1)]
    found = differences(values_of, some_gates(setting64), entries)
    for number, distance in enumerate(DISTANCES):
        gates = some_gates(setting64).requires_grad_()
        full_update(setting64, SearchSettings(gradients="full", distance=distance), 0, gates)
        size = gates.grad.abs().max().item()
        assert size > 0
        for place, values in found.items():
            assert abs(gates.grad[place].item() - values[number].item()) <= 1e-5 * size, distance
        # the first call's gates do nothing
        assert bool((gates.grad[0] == 0).all())


def test_shortcut_gradients_are_those_of_the_linear_path(setting64, in_float64, monkeypatch):
    """Of J(sg(x_N) + Σ_i W_i (e_i(gates) - sg e_i)), times the number of calls drawn from over those drawn."""
    import sdo_cli.prune.search as module

    chosen = [1, 2]
    monkeypatch.setattr(module, "_live_calls", lambda *a: chosen)
    wanted = SearchSettings(gradients="shortcut", distance="l2", live_calls=2)
    gates = some_gates(setting64, 3).requires_grad_()
    shortcut_update(setting64, wanted, 0, gates)
    path, units = setting64.update_path(0, 1), setting64.wiring.units
    modules = setting64.family.skippable("blocks")
    plan = setting64.plan(gates.detach() > 0.5)
    full = setting64.family.decode(sample_latents(path))
    x_N, kept = module.pruned_walk(path, plan, {1, 2, 3}, modules)
    w = coefficients_of(path.route).w

    def output(i, moved):
        here = dict(zip(units, moved[i], strict=True))
        with torch.no_grad():
            return gated_call(modules, lambda: path.denoise(kept[i].x, kept[i].t, path.rows), here, kept[i].stored)[0]

    def value_of(moved):
        latents = x_N.clone()
        for i in chosen:
            until = next((j for j in range(i + 1, 4) if plan.sources[j] == j), 4)
            latents = latents + sum(w[i:until]) * (output(i, moved) - output(i, gates.detach()))
        return 3 / 2 * DISTANCES["l2"](setting64.family.decode(latents), full).mean().item()

    entries = [(1, 0), (1, 4), (2, 2), (2, len(units) - 1)]
    found = differences(value_of, gates.detach(), entries)
    size = gates.grad.abs().max().item()
    assert size > 0
    assert all(abs(gates.grad[entry].item() - value) <= 1e-4 * size for entry, value in found.items())
    assert bool((gates.grad[[0, 3]] == 0).all())


def test_one_step_gradients_are_those_of_finite_differences(setting64, in_float64, monkeypatch):
    import sdo_cli.prune.search as module

    monkeypatch.setattr(module, "_live_calls", lambda *a: [2])
    wanted = SearchSettings(gradients="one-step", live_calls=1)
    gates = some_gates(setting64, 1).requires_grad_()
    value = one_step_update(setting64, wanted, 0, gates)
    path, units = setting64.update_path(0, 1), setting64.wiring.units
    modules = setting64.family.skippable("blocks")
    _, kept = module.pruned_walk(path, setting64.plan(gates.detach() > 0.5), {2}, modules)
    full = path.denoise(kept[2].x, kept[2].t, path.rows).detach()
    w = coefficients_of(path.route).w

    def value_of(moved):
        here = dict(zip(units, moved[2], strict=True))
        with torch.no_grad():
            e, _ = gated_call(modules, lambda: path.denoise(kept[2].x, kept[2].t, path.rows), here, kept[2].stored)
        return 3 * w[2] ** 2 * (e - full).square().mean().item()

    assert value == pytest.approx(value_of(gates.detach()), rel=1e-9)
    found = differences(value_of, gates.detach(), [(2, 0), (2, 3), (2, len(units) - 1)])
    size = gates.grad.abs().max().item()
    assert size > 0
    assert all(abs(gates.grad[entry].item() - value) <= 1e-5 * size for entry, value in found.items())


def test_gates_of_zero_and_one_are_the_skip_plan(small):
    bench = Bench(small("sd15"), "blocks")
    gates = bench.random_gates(3)
    gates[0] = True
    with torch.no_grad():
        soft = gated_latents(bench.path(), bench.modules, bench.wiring.units, gates.float())
    hard = sample_latents(bench.path(bench.plan(gates)))
    assert (soft - hard).abs().max() <= 1e-6 * hard.abs().max()


# searches


@pytest.fixture(scope="module")
def setting(small):
    source = ModelSource(str(small("sd15")))
    family = load_family(source, dtype=torch.float32)
    family.to(torch.device("cpu"), torch.float32)
    settings = DrawSettings("ddim", num_inference_steps=6, guidance_scale=3.0)
    return Setting(family, source, PromptEmbeddings(family), settings, PROMPTS)


def test_l2c_gradients_are_those_of_finite_differences(setting64, in_float64):
    """Of the unweighted squared errors at every other call, stored outputs and latents those of the full path."""
    wanted = SearchSettings("table", "l2c", live_calls=2)
    gates = soft_gates(some_gates(setting64, 4) - 0.3).detach().requires_grad_()
    loss = l2c_update(setting64, wanted, 0, gates)
    path, units = setting64.update_path(0, 1), setting64.wiring.units
    modules = setting64.family.skippable("blocks")
    inputs, outputs = [], []

    def note(i, x, t):
        inputs.append((x, t))
        outputs.append(gated_call(modules, lambda: path.denoise(x, t, path.rows), {}, {}))
        return outputs[-1][0]

    @torch.no_grad()
    def value_of(moved):
        total = 0.0
        for i in (1, 3):
            (x, t), here = inputs[i], dict(zip(units, moved[i], strict=True))
            e, _ = gated_call(modules, lambda x=x, t=t: path.denoise(x, t, path.rows), here, outputs[i - 1][1])
            total += (e - outputs[i][0]).square().mean().item()
        return total

    with torch.no_grad():
        denoise_path(path, note)
    assert loss == pytest.approx(value_of(gates.detach()), rel=1e-9)
    found = differences(value_of, gates.detach(), [(1, 0), (1, 3), (3, 1), (3, len(units) - 1)])
    size = gates.grad.abs().max().item()
    assert size > 0 and all(abs(gates.grad[place].item() - value) <= 1e-5 * size for place, value in found.items())
    # whole calls have no gates
    assert bool((gates.grad[[0, 2]] == 0).all()) and bool((gates[[0, 2]] == 1).all())


def test_l2c_keeps_every_other_call_whole_and_open_gates_are_the_model(setting):
    wanted = SearchSettings("table", "l2c", updates=6, live_calls=3, sparsity=0.5, learning_rate=2.0, optimizer="adamw")
    found = list(search(setting, wanted))
    assert found[-1].kept < found[0].kept and found[-1].scores[1::2].abs().max() <= 5
    plan = setting.plan(runs_at(0.3, found[-1].scores, setting.wiring, setting.budget))
    assert plan.runs[::2].all() and not plan.runs[1::2].all()
    opened = setting.plan(torch.ones(6, len(setting.wiring.units), dtype=torch.bool))
    a, b = (sample_latents(setting.path(PROMPTS[:1], [3], plan=plan)) for plan in (None, opened))
    assert torch.equal(a, b)
    # the same again from the middle on
    again = list(search(setting, wanted, state=None))
    assert torch.equal(again[-1].scores, found[-1].scores)


@pytest.mark.parametrize("gradients", ["shortcut", "full", "one-step"])
def test_a_search_drops_what_costs_and_is_the_same_again(setting, gradients):
    few = replace(setting, settings=replace(setting.settings, num_inference_steps=4))
    wanted = SearchSettings("attention", gradients, updates=4, live_calls=2, learning_rate=0.3)
    first, second = list(search(few, wanted)), list(search(few, wanted))
    assert first[0].kept == 1.0 and first[-1].kept < 0.9
    assert torch.equal(first[-1].scores, second[-1].scores)
    assert [update.number for update in first] == list(range(1, 5))


def test_without_sparsity_nothing_is_dropped(setting):
    """The whole network is at no distance from itself: there is no gradient."""
    wanted = SearchSettings("table", "shortcut", updates=3, sparsity=0.0, optimizer="sgd", learning_rate=1.0)
    found = list(search(setting, wanted))
    assert all(update.kept == 1.0 for update in found)
    assert found[-1].scores.sub(found[0].scores).abs().max() < 1e-3


def test_the_sparsity_term_ends_below_enough(setting, monkeypatch):
    import sdo_cli.prune.search as module

    monkeypatch.setattr(module, "shortcut_update", lambda *a: 0.0)
    wanted = SearchSettings("table", "shortcut", updates=60, enough=0.5, optimizer="sgd", learning_rate=20.0)
    kept = [update.kept for update in search(setting, wanted)]
    # once the share is below, nothing moves any more
    assert min(kept) < 0.5 and kept[-1] == min(kept)


# ratios and baselines


def test_a_ratio_is_met_to_within_one_unit(setting):
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        scores = torch.rand(setting.calls, len(setting.wiring.units), generator=generator)
        before = None
        for ratio in (0.0, 0.2, 0.5, 0.7):
            runs = runs_at(ratio, scores, setting.wiring, setting.budget)
            share = setting.budget.kept(runs)
            assert share <= 1 - ratio + 1e-9, (seed, ratio)
            assert torch.equal(live(runs, setting.wiring), runs)
            assert before is None or share <= before + 1e-9
            before = share
    # no gate left: one call
    assert runs_at(0.99, scores, setting.wiring, setting.budget).sum() == len(setting.wiring.units)
    assert bool(runs_at(0.0, scores, setting.wiring, setting.budget).all())


def test_equal_scores_meet_any_ratio_too(setting):
    scores = torch.ones(setting.calls, len(setting.wiring.units))
    share = setting.budget.kept(runs_at(0.5, scores, setting.wiring, setting.budget))
    assert 0.3 < share <= 0.5 + 1e-9


def test_the_best_scores_are_kept():
    scores = torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0], [3.0, 3.0]])
    runs = runs_at(0.5, scores, CHAIN, Budget(torch.tensor([0.5, 0.5], dtype=torch.float64), 0.0, False))
    assert runs.tolist() == [[True, True], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("grain", ["blocks", "parts"])
def test_the_budget_is_the_counted_cost(small, kind, grain):
    """Also where the last layers run at every call, and a lot is outside the units."""
    source = ModelSource(str(small(kind)))
    family = load_family(source, dtype=torch.float32)
    family.to(torch.device("cpu"), torch.float32)
    settings = DrawSettings("ddim" if kind == "sd15" else "auto", num_inference_steps=8, guidance_scale=3.0)
    small_setting = Setting(family, source, PromptEmbeddings(family), settings, PROMPTS, grain)
    for ratio in (0.3, 0.6):
        for name, make in METHODS.items():
            plan = make(small_setting, ratio)
            kept = small_setting.flops.kept(plan)
            assert kept == pytest.approx(small_setting.budget.kept(plan.runs)), name
            # one whole call and the last layers may be all there is room for
            assert kept <= 1 - ratio + 1e-9 or plan.runs[1:].sum() == 0, name


def test_uniform_reuse_computes_whole_calls_at_even_intervals(setting):
    runs = uniform(0.5, setting.calls, setting.wiring, setting.budget)
    assert runs.all(1).tolist() == runs.any(1).tolist() == every(6, 3).tolist() == [True, False] * 3


def test_deep_cache_keeps_the_outermost_way(setting):
    names = setting.wiring.units
    runs = deep_cache(0.4, 50, setting.wiring, setting.budget)
    between = runs[~runs.all(1)]
    assert len(between) and [names[b] for b in between[0].nonzero().flatten()] == ["down_blocks.0", "up_blocks.1"]
    assert bool((between == between[0]).all())
    # where that way alone costs too much, it is uniform reuse
    assert torch.equal(
        deep_cache(0.8, 50, setting.wiring, setting.budget), uniform(0.8, 50, setting.wiring, setting.budget)
    )


def test_random_gates_are_keyed(setting):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return random_gates(0.5, 20, setting.wiring, setting.budget, generator=generator)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


# measures


def test_controls_have_as_much_computation_at_most(setting):
    arms = controls(setting, [0.5])
    assert {arm.name.split(" guidance")[0].rstrip("0123456789. -") for arm in arms} == {
        "ddim", "dpm++2m", "ipndm", "optimal-steps", "pairwise-steps", "uniform", "deepcache", "random"
    }  # fmt: skip
    measured = measure(setting, arms, setting.prompts, {}, reporter=Silent(), rounds=1, batch_size=3)
    found = {item.arm.name: item for item in measured}
    full = found["full"]
    assert full.kept == 1.0 and full.values["ssim"].mean() == pytest.approx(1)
    assert all(item.kept <= 0.5 + 1e-9 and item.speed_up[0] > 0 for name, item in found.items() if name != "full")
    assert found["ddim-3"].kept == pytest.approx(0.5)
    assert all(len(item.values["ssim"]) == 3 and item.values["ssim"].max() <= 1 for item in found.values())


def test_controls_of_few_steps_stand_there_with_less_guidance_too(setting):
    """With the multiple that ends nearest to the full sampler; steps and plan stay; nothing without guidance."""
    setting = replace(setting, settings=replace(setting.settings, guidance_scale=40.0, num_inference_steps=10))
    arms = [arm for arm in controls(setting, [0.8]) if "-2" in arm.name]
    plain = {arm.name: arm for arm in arms if " guidance " not in arm.name}
    less = at_their_guidance(setting, list(plain.values()))
    assert [arm.name for arm in arms if " guidance " in arm.name] == [arm.name for arm in less]
    for arm in plain.values():
        prompts = setting.prompts_of(0, min(8, len(setting.prompts)))
        seeds = [key_to_seed(setting.seed, "prune-guidance", j) for j in range(len(prompts))]
        target = sample_latents(setting.path(prompts, seeds))
        distances = {}
        for multiple in (1.0, 0.85, 0.7, 0.55, 0.4):
            scale = multiple * setting.settings.guidance_scale
            one = replace(setting, settings=replace(arm.settings, guidance_scale=scale))
            found = sample_latents(one.path(prompts, seeds, plan=arm.plan))
            distances[multiple] = float((found - target).square().mean())
        best = min(distances, key=distances.get)
        mine = [one for one in less if one.name.startswith(f"{arm.name} guidance")]
        assert len(mine) == (best != 1.0)
        assert all(one.settings.guidance_scale == pytest.approx(best * 40) and one.plan is arm.plan for one in mine)
    # somewhere less is nearer, or this shows nothing
    assert less
    bare = replace(setting, settings=replace(setting.settings, guidance_scale=1.0))
    assert at_their_guidance(bare, list(plain.values())) == []


def test_controls_of_chosen_steps_and_of_a_solver_with_an_extra_call(setting):
    schedule = schedules(setting, "pairwise-steps", 4)[4]
    chosen = replace(setting, settings=replace(setting.settings, num_inference_steps=4, timesteps=schedule.timesteps))
    pndm = replace(setting, settings=replace(setting.settings, solver="pndm"))
    for other in (chosen, pndm):
        arms = controls(other, [0.4])
        found = list(measure(other, arms, other.prompts[:2], {}, reporter=Silent(), rounds=0, batch_size=2))
        assert all(item.kept <= 0.6 + 1e-9 for item in found[1:])
    # pndm makes a call more than steps
    assert "pndm-3" in [arm.name for arm in controls(pndm, [0.4])]


def test_a_schedule_is_a_plan_that_skips_nothing(setting):
    schedule = schedules(setting, "optimal-steps", 3)[3]
    plan = from_schedule(setting, schedule, "optimal-steps", 0.5)
    settings = replace(setting.settings, num_inference_steps=3, timesteps=schedule.timesteps)
    assert bool(plan.runs.all()) and plan.made_for.timesteps == schedule.timesteps
    path = replace(setting, settings=settings).path(setting.prompts, [1, 2, 3])
    assert torch.equal(sample_latents(setting.path(setting.prompts, [1, 2, 3], plan=plan)), sample_latents(path))
    skips_of(plan, setting.family, settings)


def test_kept_is_counted_flops(setting):
    plan = setting.plan(uniform(0.5, setting.calls, setting.wiring, setting.budget))
    costs = unit_flops(setting.source, "blocks")
    assert costs.kept(plan) == pytest.approx(0.5)
    half = setting.plan(torch.cat([torch.ones(1, 5), torch.tensor([[1.0, 0, 0, 0, 1]]).expand(5, 5)]))
    outer = costs.units["down_blocks.0"].all + costs.units["up_blocks.1"].all + costs.rest.all
    assert costs.of_plan(half).all == pytest.approx(costs.call.all + 5 * outer)


# the command


@pytest.fixture(scope="module")
def model(small):
    """Words of a command that name a small model."""
    return "-m", str(small("sd15"))


@pytest.fixture(scope="module")
def mine(model):
    return *model, "-p", "mine.txt"


@pytest.fixture(scope="module")
def pruned(mine, tmp_path_factory):
    """A folder of `sdo prune`, dip-go on a small model."""
    where = tmp_path_factory.mktemp("prune")
    (where / "mine.txt").write_text("".join(f"a {name} on the cat\n" for name in ("tiger", "bus", "dog", "rose")))
    done = sdo(
        "prune", *mine, "--steps", "5", "--guidance", "3", "--ratio", "0.6", "--ratio", "0.4",
        "--updates", "4", "--lr", "0.4", "--live-calls", "2", "--num-prompts", "2", "--rounds", "1",
        "--batch-size", "2", "--reward", "colorfulness", "--out", "found",
        cwd=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return where, done


def test_prune_writes_plans_scores_and_figures(pruned, model):
    where, done = pruned
    folder = where / "found"
    assert {path.name for path in folder.iterdir()} == {
        "plan-0.40.json", "plan-0.60.json", "scores.safetensors", "search.jsonl", "measures.json", "measures.csv",
        "measures.png", "table.md", "manifest.json",
    }  # fmt: skip
    plan = load_plan(folder / "plan-0.60.json")
    assert plan.cost["kept"] <= 0.4 and plan.made_by["method"] == "dip-go"
    assert plan.quality["colorfulness"]["difference"] and plan.quality["prompts"] == 2
    assert len((folder / "search.jsonl").read_text().splitlines()) == 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    searched, measured = manifest["job"]["prompts"], manifest["job"]["measure"]["prompts"]
    assert len(searched) == len(measured) == 2 and not set(searched) & set(measured)
    assert "dip-go 0.6" in done.stdout and "ddim-2" in done.stdout and "--skip-plan found/plan-0.40.json" in done.stdout
    assert Image.open(folder / "measures.png").width > 600
    figures = json.loads((folder / "measures.json").read_text())
    assert sum(unit["share"] for unit in figures["units"].values()) == pytest.approx(1, abs=0.01)
    arm = next(arm for arm in figures["arms"] if arm["name"] == "dip-go 0.6")
    network = arm["cost"]["kept"] * 2 * 5 * figures["call"]["gflops"]
    # both branches of five calls, and the decoder
    assert arm["cost"]["image_gflops"] == pytest.approx(network + decode_flops(ModelSource(model[1])) / 1e9)


def test_other_ratios_come_from_the_same_scores(pruned, mine):
    where, _ = pruned
    done = sdo(
        "prune", *mine, "--steps", "5", "--guidance", "3", "--ratio", "0.5", "--scores", "found",
        "--num-prompts", "0", "--out", "again", cwd=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "search" not in done.stderr
    assert load_plan(where / "again/plan-0.50.json").made_by["ratio"] == 0.5
    wrong = sdo("prune", *mine, "--steps", "7", "--scores", "found", "--num-prompts", "0", "--out", "b", cwd=where)
    assert wrong.returncode == 2 and "are of another num_inference_steps" in wrong.stderr


def test_sample_uses_a_plan_and_takes_its_steps(pruned, model):
    where, _ = pruned
    words = ("sample", "a tiger", *model)
    done = sdo(*words, "--skip-plan", "found/plan-0.60.json", "--guidance", "3", "--out", "s", cwd=where)
    assert done.returncode == 0, done.stderr
    text = Image.open(where / "s/00000.png").text["parameters"]
    assert "Steps: 5" in text and f"Skip plan: {load_plan(where / 'found/plan-0.60.json').fingerprint}" in text
    full = sdo(*words, "--steps", "5", "--guidance", "3", "--out", "f", cwd=where)
    assert full.returncode == 0
    pixels = [np.asarray(Image.open(where / name / "00000.png")) for name in ("s", "f")]
    assert not np.array_equal(*pixels)
    other = sdo(*words, "--skip-plan", "found/plan-0.60.json", "--steps", "9", "--out", "o", cwd=where)
    assert other.returncode == 2 and "--steps 9: found/plan-0.60.json was made for 5" in other.stderr
    assert not (where / "o").exists()


def test_a_grid_under_a_plan_is_made_of_what_is_drawn_alone(pruned, model):
    where, _ = pruned
    words = ("sample", "a tiger", *model, "--skip-plan", "found/plan-0.60.json")
    grid = sdo(*words, "--guidance", "1,3", "--grid", "--out", "g", cwd=where)
    alone = sdo(*words, "--guidance", "3", "--out", "alone", cwd=where)
    assert grid.returncode == alone.returncode == 0, grid.stderr + alone.stderr
    assert (where / "g/00001.png").read_bytes() == (where / "alone/00000.png").read_bytes()
    both = sdo(*words, "--steps", "5,9", "--grid", "--out", "no", cwd=where)
    assert both.returncode == 2 and "--steps: a list, but --skip-plan says the steps" in both.stderr


def test_sample_refuses_a_plan_of_another_model(pruned, model):
    where, _ = pruned
    done = sdo("sample", "the cat", "--skip-plan", "found/plan-0.60.json", "-q", "--out", "o", cwd=where)
    assert done.returncode == 2 and f"made for {model[1]}, whose denoiser is built otherwise" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_eval_draws_everything_with_a_plan_too(pruned, model, mine):
    where, _ = pruned
    words = ["eval", *mine, "--skip-plan", "found/plan-0.60.json", "--guidance", "3", "--rewards", "colorfulness"]
    done = sdo(*words, "--no-embedding", "--out", "e", cwd=where)
    assert done.returncode == 0, done.stderr
    tree = json.loads((where / "e/summary.json").read_text())
    assert list(tree["variants"]) == ["base", "base+plan-0.60"]
    assert tree["settings"]["draw"]["num_inference_steps"] == 5
    assert "difference" in tree["differences"]["base+plan-0.60"]["colorfulness"]
    # the same images again from what the PNG and the plan say
    item = json.loads((where / "e/base+plan-0.60/metadata.jsonl").read_text().splitlines()[0])
    again = sdo(
        "sample", item["prompt"], *model, "--seed", str(item["seed"]), "--skip-plan", "found/plan-0.60.json",
        "--guidance", "3", "--out", "again-e", cwd=where,
    )  # fmt: skip
    assert again.returncode == 0
    gap = np.asarray(Image.open(where / "again-e/00000.png")).astype(int) - np.asarray(
        Image.open(where / "e/base+plan-0.60" / item["file_name"])
    )
    assert np.abs(gap).max() <= 1
    changed = json.loads((where / "found/plan-0.60.json").read_text())
    changed["runs"][-1] = "1" * len(changed["units"])
    changed["runs"] = changed["runs"][:1] + ["1" * len(changed["units"])] * 4
    (where / "plan-0.60.json").write_text(json.dumps(changed))
    words[words.index("found/plan-0.60.json")] = "plan-0.60.json"
    other = sdo(*words, "--no-embedding", "--out", "e", cwd=where)
    assert other.returncode == 2 and "has changed, or is another one of that name" in other.stderr


@pytest.mark.parametrize("method", ["uniform", "optimal-steps"])
def test_methods_without_a_search(pruned, model, mine, method):
    where, _ = pruned
    words = ("--steps", "5", "--guidance", "3", "--ratio", "0.5", "--num-prompts", "0", "--out", method)
    done = sdo("prune", *mine, "--method", method, *words, cwd=where)
    assert done.returncode == 0, done.stderr
    plan = f"{method}/plan-0.50.json"
    drawn = sdo("sample", "a tiger", *model, "--skip-plan", plan, "--guidance", "3", "--out", f"s-{method}", cwd=where)
    assert drawn.returncode == 0, drawn.stderr
    if method == "optimal-steps":
        assert "Steps: 2" in Image.open(where / f"s-{method}/00000.png").text["parameters"]
        # chosen steps, and blocks of those steps skipped
        both = sdo(
            "prune", *mine, "--schedule", plan, "--guidance", "3", "--ratio", "0.3", "--updates", "2",
            "--live-calls", "1", "--num-prompts", "0", "--out", "both", cwd=where,
        )  # fmt: skip
        assert both.returncode == 0, both.stderr
        found = load_plan(where / "both/plan-0.30.json")
        assert found.made_for.timesteps == load_plan(where / plan).made_for.timesteps and not bool(found.runs.all())
        drawn = sdo("sample", "a tiger", *model, "--skip-plan", "both/plan-0.30.json", "--out", "s-both", cwd=where)
        assert drawn.returncode == 0, drawn.stderr


def test_the_embedded_model_is_measured_by_the_embedded_clip(pruned):
    where, _ = pruned
    words = ("--steps", "5", "--ratio", "0.5", "--method", "uniform", "--no-controls", "--rounds", "1")
    more = ("--num-prompts", "2", "--batch-size", "2", "--reward", "clip", "--out", "clip")
    done = sdo("prune", "-p", "mine.txt", *words, *more, cwd=where)
    assert done.returncode == 0, done.stderr
    assert load_plan(where / "clip/plan-0.50.json").quality["clip-embedded"]["difference"]


def test_a_schedule_has_steps_of_its_own_and_their_solver(pruned, mine):
    where, _ = pruned
    words = ("prune", *mine, "--num-prompts", "0", "--guidance", "3", "--updates", "2", "--live-calls", "1")
    done = sdo(*words, "--schedule", "found/plan-0.60.json", "--out", "no", cwd=where)
    assert done.returncode == 2 and "found/plan-0.60.json has no steps of its own" in done.stderr
    made = ("--method", "pairwise-steps", "--steps", "5", "--ratio", "0.5", "--out", "pairs")
    assert sdo(*words[:9], *made, cwd=where).returncode == 0
    done = sdo(*words, "--schedule", "pairs/plan-0.50.json", "--solver", "euler", "--out", "no", cwd=where)
    assert done.returncode == 2 and "were chosen for the solver ddim" in done.stderr and not (where / "no").exists()


def test_an_interrupted_search_can_be_used(pruned, mine):
    where, _ = pruned
    words = ["prune", *mine, "--steps", "5", "--guidance", "3", "--num-prompts", "0", "--live-calls", "2"]
    process = forked.Forked([*words, "--updates", "100000", "--out", "cut"], cwd=where)
    until = time.monotonic() + 120
    while not (where / "cut/search.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(60)
    assert process.returncode == 130 and "its scores so far can be used: --scores" in said
    assert json.loads((where / "cut/manifest.json").read_text())["status"] == "interrupted"
    assert not list((where / "cut").glob("plan-*"))
    done = sdo(*words, "--ratio", "0.5", "--scores", "cut", "--out", "from-cut", cwd=where)
    assert done.returncode == 0, done.stderr
    plan = load_plan(where / "from-cut/plan-0.50.json")
    assert plan.made_by["updates_done"] == len((where / "cut/search.jsonl").read_text().splitlines())


BAD = {
    "no prompts": ([], "--prompts: is missing"),
    "unknown file": (["-p", "none.txt"], "--prompts: no file none.txt"),
    "method": (["-p", "mine.txt", "--method", "magic"], "--method: 'magic' is not one of dip-go"),
    "ratio": (["-p", "mine.txt", "--ratio", "1"], "--ratio: must be at least 0 and below 1, not 1"),
    "decimals": (["-p", "mine.txt", "--ratio", "0.875"], "--ratio: 0.875 has more than two decimals"),
    "others": (["-p", "mine.txt", "--method", "uniform", "--scores", "found"], "--method uniform makes none"),
    "searched on": (
        ["-p", "mine.txt", "-m", "small", "--steps", "5", "--scores", "found", "--measure-on", "searched.txt"],
        "2 of the prompts to measure on were searched on",
    ),
    "nan": (["-p", "mine.txt", "--ratio", "nan"], "--ratio: must be at least 0 and below 1"),
    "steps": (["-p", "mine.txt", "--steps", "1", "--live-calls", "1"], "--steps: there is nothing to skip in 1"),
    "live": (["-p", "mine.txt", "--steps", "4", "--live-calls", "4"], "--live-calls: 4 of 4 steps"),
    "reward": (["-p", "mine.txt", "--reward", "beauty"], "unknown reward 'beauty'"),
    "l2c": (
        ["-p", "mine.txt", "--steps", "6", "--gradients", "l2c", "--live-calls", "4"],
        "--live-calls: l2c has gates at every other call",
    ),
    "lr": (["-p", "mine.txt", "--lr", "0"], "--lr: must be above 0"),
    "one": (["-p", "mine.txt", "--num-prompts", "1"], "--num-prompts: an interval needs 2"),
    "scores": (["-p", "mine.txt", "--scores", "none"], "--scores none: there is no such file"),
    "few": (["-p", "one.txt"], "are too few to search on some and measure on two others"),
    "out": (["-p", "mine.txt", "--out", "found"], "--out found: is not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(pruned, model, case):
    where, _ = pruned
    (where / "one.txt").write_text("a tiger\n")
    searched = json.loads((where / "found/manifest.json").read_text())["job"]["prompts"]
    (where / "searched.txt").write_text("\n".join(searched[:2]) + "\n")
    words, said = BAD[case]
    done = sdo("prune", *(model[1] if word == "small" else word for word in words), cwd=where)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
