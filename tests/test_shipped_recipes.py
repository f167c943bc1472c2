"""Every shipped recipe, run for two steps on a small random model of its family with small real-format rewards."""

import json
import re
from pathlib import Path

import entry
import pytest
from safetensors.torch import load_file
from small_rewards import make_small_reward
from test_fast_rollouts import fast_lora

import rewards
from sdo_cli.models.catalog import MODELS
from sdo_cli.recipe.load import find_recipe, load_recipe, shipped_recipes
from sdo_cli.weights.needs import needs_of

REAL = [name for name in shipped_recipes() if name not in ("quickstart", "bench", "guarded")]
KIND = {"sd15": "sd15", "sdxl": "sdxl", "sd35-medium": "sd35"}
PROMISED = {
    "aesthetic",
    "hps",
    "clip",
    "pickscore",
    "mixed",
    "sdxl-hps",
    "sdxl-full",
    "sd35-hps",
    "low-memory",
    "low-memory-sdxl",
    "turbo",
    "lcm",
}


def test_the_promised_recipes_ship():
    assert set(REAL) >= PROMISED


def small_version(name, small, folder):
    """Overrides that put small weights in place of the real ones and shorten the run; nothing else is changed."""
    recipe = load_recipe(name).recipe
    kind = KIND[MODELS[recipe.model].config]
    words = [f"model={small(kind)}", "max_train_steps=2", "gradient_accumulation_steps=1", "lr_warmup_steps=0"]
    words += ["num_inference_steps=3", "validation.num_prompts=1", "validation.grid_prompts=1", "variant=null"]
    if recipe.height:
        words += ["height=64", "width=64"]
    if recipe.vae:
        words += [f"vae={small(kind) / 'vae'}"]
    if recipe.rollout.lora:
        words += [f"rollout.lora={fast_lora(small(kind), folder.parent / 'fast')}", "rollout.drift_steps=0"]
    words += ["guard.steps=1", "guard.num_prompts=2", "validation.batch_size=2"]
    places = {
        "rewards": recipe.rewards,
        "validation.rewards": recipe.validation.rewards,
        "guard.rewards": recipe.guard.rewards,
    }
    for place, specs in places.items():
        entries = []
        for spec in specs:
            full = rewards.full_name(spec.name)
            options = make_small_reward(full, folder / full)
            entries.append({"name": spec.name, "weight": spec.weight, "options": options})
        words.append(f"{place}={json.dumps(entries)}")
    return words


@pytest.mark.parametrize("name", REAL)
def test_two_steps(name, small, tmp_path):
    words = small_version(name, small, tmp_path / "weights")
    done = entry.run(["finetune", "--recipe", name, "--out", "run", "--json", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(name).recipe
    if recipe.train == "full":
        unet = Path("unet/diffusion_pytorch_model.safetensors")
        own, trained = (load_file(place / unet) for place in (small("sdxl"), tmp_path / "run/pipeline"))
        assert any((own[key].float() - trained[key].float()).abs().max() > 1e-6 for key in own)
    else:
        weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
        assert any(value.abs().max() > 0 for key, value in weights.items() if ".up." in key or "lora_B" in key)
    record = json.loads(done.stdout)
    measured = {spec.name for spec in (*recipe.rewards, *recipe.validation.rewards)}
    assert set(record["gains"]) == measured
    assert len((tmp_path / "run" / "guard.jsonl").read_text().splitlines()) == 3
    # of a whole model the best is not kept beside the run: it would be as large again
    assert (tmp_path / "run" / "best").is_dir() == (recipe.train != "full")
    # short names stand for the newest version, and that is said
    for name in measured & set(rewards.SHORT):
        assert f"reward {name}: the newest version, {rewards.SHORT[name]}" in done.stderr


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_opens_with_the_command_that_runs_it(name):
    lines = find_recipe(name).read_text().splitlines()
    assert lines[0] == f"# sdo finetune --recipe {name}" and load_recipe(name).recipe.description


@pytest.mark.parametrize("name", REAL)
def test_each_says_what_it_needs_and_what_to_expect(name):
    head = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    needs = next(line for line in head if line.startswith("# Needs: "))
    said = re.search(r"GPU of \d+ GB \([\d.]+ GB estimated\).* (\d+) GB of weights", needs)
    assert int(said[1]) == round(sum(need.size for need in needs_of(load_recipe(name).recipe)) / 1e9)
    assert any(line.startswith("# Expect: ") for line in head)
    assert any(f"sdo fetch {name} " in line for line in head)
    assert any("Not run on real weights" in line for line in head)


@pytest.mark.parametrize("name", REAL)
def test_none_trains_and_measures_with_the_same_reward_alone(name):
    recipe = load_recipe(name).recipe
    trained = {rewards.full_name(spec.name) for spec in recipe.rewards}
    assert {rewards.full_name(spec.name) for spec in recipe.validation.rewards} - trained
