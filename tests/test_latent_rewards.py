"""Rewards that see x_N: no decoder where nobody looks at a picture, the model's VAE where only pictures are there."""

import json
from dataclasses import replace

import entry
import pytest
import torch
from small_rewards import make_small_reward

import rewards
from rewards.base import LatentSpace, RewardInfo
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.scoring import RewardSetup, ScoreSetup, needs_decoder, score_cost
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import CombineSpec
from sdo_cli.scoring.latents import as_measure, check_latent_space
from sdo_cli.training.objective import RewardObjective, WeightedReward

PLUGIN = """
from rewards import reward
from rewards.base import LatentSpace


@reward("calm", summary="small latents: minus their mean square", sees="latent")
class Calm:
    latents = LatentSpace("the embedded model", channels=4, scaling=0.7499868, factor=4)

    def score(self, latents, prompts):
        return -latents.square().flatten(1).mean(1)
"""
TINY = ["max_train_steps=2", "train_batch_size=2", "num_inference_steps=3", "validation.num_prompts=2"]
TINY += ["validation.grid_prompts=0", "gradient_accumulation_steps=1"]

ANEW = ["rollout.updates=2", "rollout.rescore=true", "gradient.options.weights=true/p"]


class Calm:
    info = RewardInfo("calm", "", "", "", (-9.0, 0.0), sees="latent")
    latents = LatentSpace("the embedded model", channels=4, scaling=0.7499868, factor=4)

    def score(self, latents, prompts):
        return -latents.square().flatten(1).mean(1)


class Bright:
    info = RewardInfo("bright", "", "", "", (0.0, 1.0))

    def score(self, images, prompts):
        return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def family():
    found = load_family(ModelSource("embedded"), dtype=torch.float32)
    found.vae.requires_grad_(False)
    return found


def weighed(*rewards):
    return [WeightedReward(reward.info.name, reward, weight) for weight, reward in enumerate(rewards, 1)]


def latents(count=3):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def gradient(objective, x_N):
    leaf = x_N.clone().requires_grad_()
    scored = objective(leaf, torch.arange(len(leaf)))
    return torch.autograd.grad(scored.losses.sum(), leaf)[0], scored


def test_nothing_is_decoded_where_every_reward_sees_latents(family):
    def decode(x):
        raise AssertionError("decoded")

    objective = RewardObjective(family, weighed(Calm()), ["a"] * 3, decode)
    g, scored = gradient(objective, latents())
    assert torch.allclose(g, 2 * latents() / latents()[0].numel())
    assert torch.allclose(scored.rewards["calm"], Calm().score(latents(), []))
    with torch.no_grad():
        objective(latents(), torch.arange(3))


def test_latents_and_pictures_in_one_recipe(family):
    """Losses and gradients add up, by any rule that looks at them too, and the decoder runs once."""
    calls = []

    def decode(x):
        calls.append(len(x))
        return family.decode(x)

    alone = [gradient(RewardObjective(family, [item], ["a"] * 3), latents())[0] for item in weighed(Calm(), Bright())]
    for combine in (CombineSpec(), CombineSpec(measure=True), CombineSpec(conflict="projection")):
        calls.clear()
        objective = RewardObjective(family, weighed(Calm(), Bright()), ["a"] * 3, decode, combine)
        g, scored = gradient(objective, latents())
        assert calls == [3] and list(scored.rewards) == ["calm", "bright"]
        if combine.conflict == "none":
            assert torch.allclose(g, alone[0] + alone[1], rtol=1e-4, atol=1e-7)
        if combine.looks:
            lengths = [part.flatten(1).norm(dim=1) for part in alone]
            looked = objective.looks[0]
            assert torch.allclose(looked["calm"], lengths[0], rtol=1e-4)
            assert torch.allclose(looked["bright"], lengths[1], rtol=1e-3)


def test_a_measure_of_pictures_encodes_them(family):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    measure = as_measure("calm", Calm(), family)
    assert measure.info.sees == "picture"
    assert torch.allclose(measure.score(images, ["a"] * 3), Calm().score(family.to_latents(images), []), atol=1e-6)
    bright = Bright()
    assert as_measure("bright", bright, family) is bright


def test_another_models_latents_are_refused(family):
    other = Calm()
    other.latents = replace(Calm.latents, name="SDXL", scaling=0.13025, factor=8)
    with pytest.raises(
        RecipeFault, match=r"reads latents of SDXL \(4 channels of a 8th of the size, scaled by 0.13025"
    ):
        check_latent_space("calm", other, family)
    check_latent_space("calm", Calm(), family)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "calm.py").write_text(PLUGIN)
    return tmp_path


def run(words, cwd):
    return entry.run(words, cwd=cwd)


def test_a_run_on_a_latent_reward(folder):
    """Trained on latents alone, held-out pictures measured by the encoder; several updates, scores in pieces."""
    words = ["finetune", "quickstart", "--plugin", "calm.py", "rewards=[calm]", "--out", "run", "--json", *TINY]
    words += ["gradient.score_micro_batch=1", "validation.rewards=[colorfulness]"]
    done = run(words, folder)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["gains"]) == {"calm", "colorfulness"}
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["rewards"]["calm"] < 0 for row in rows)
    done = run([*words[:4], *TINY, "rewards=[calm,clip]", *ANEW], folder)
    assert done.returncode == 0, done.stderr


def test_the_commands_refuse_what_latents_cannot_do(folder):
    small = make_small_reward("lrm-1.5", folder / "small")["model"]
    base = ["finetune", "quickstart", "--plugin", "calm.py", *TINY]
    for words, said in (
        ([*base, "rewards=[calm]", "sight={crop: 0.1}"], "sight.crop: alters pictures, and calm sees latents"),
        ([*base, "rewards=[calm]", "decoder=tiny"], "tiny has nothing to decode: every reward sees latents"),
        ([*base, "rewards=[calm]", "vae_checkpointing=true"], "every reward sees latents"),
        ([*base, "rewards=[{name: mixture, options: {parts: [{name: calm}]}}]"], "name it beside the mixture"),
        ([*base, f"rewards=[{{name: lrm-1.5, options: {{model: {small}}}}}]"], "reads latents of Stable Diffusion 1.x"),
        ([*base, "rewards=[lrm-1.5]"], "lrm-1.5 needs the option model"),
        (
            ["optimize", "--prompt", "a bus", "--plugin", "calm.py", "--objective", "calm", "--steps", "1"],
            "calm sees latents, and sdo optimize needs one that sees pictures",
        ),
    ):
        done = run(words, folder)
        assert done.returncode == 2 and said in " ".join(done.stderr.split()), (words, done.stderr)
        assert "Traceback" not in done.stderr


def test_an_evaluation_measures_by_the_models_own_encoder(folder):
    (folder / "prompts.txt").write_text("a red bus\na bird\n")
    words = ["eval", "--plugin", "calm.py", "--rewards", "calm", "--no-embedding", "--prompts", "prompts.txt"]
    done = run([*words, "--model", "embedded", "--steps", "2", "--out", "e"], folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "e/scores.jsonl").read_text().splitlines()]
    assert {line["measure"] for line in lines} == {"calm"} and all(line["score"] < 0 for line in lines)
    from sdo_cli.drawing.pictures import read_image

    family = load_family(ModelSource("embedded"), dtype=torch.float32)
    line = lines[0]
    file = next((folder / "e").rglob(line["image"]))
    own = Calm().score(family.to_latents(read_image(file)[None]), [])
    assert own.item() == pytest.approx(line["score"], rel=1e-4)
    done = run([*words, "--images", str(file.parent), "--out", "f"], folder)
    assert done.returncode == 2 and "calm sees latents, and files are pictures" in " ".join(done.stderr.split())


def test_the_estimates_score_stage_has_no_decoder():
    recipe = load_recipe("hps", ["rewards=[{name: lrm-1.5, options: {model: /gone}}]"]).recipe
    blind = ScoreSetup.of(recipe, (RewardSetup.of("lrm-1.5", {}),))
    both = ScoreSetup.of(recipe, (RewardSetup.of("lrm-1.5", {}), RewardSetup.of("colorfulness", {})))
    assert not needs_decoder(blind) and needs_decoder(both)
    # the decoder's part is the larger one, in work and in memory
    alone, with_decoder = score_cost(blind, 2), score_cost(both, 2)
    assert with_decoder.flops > 2 * alone.flops and with_decoder.peak > 1.5 * alone.peak


def test_doctor_says_so(folder):
    words = ["doctor", "hps", "rewards=[{name: lrm-1.5, options: {model: /gone}}]", "guard={}", "validation={}"]
    done = run([*words, "--gpu", "4090"], folder)
    assert "the score stage has no decoder: every reward sees latents" in " ".join(done.stdout.split()), done.stdout


@pytest.mark.parametrize("name", ["lrm-1.5", "lrm-xl"])
def test_latent_rewards_pass_their_contract(name, tmp_path):
    options = make_small_reward(name, tmp_path / "small")
    done = run(["reward", "check", name, "-o", f"model={options['model']}", "--size", "128", "--json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {finding["item"]: finding["passed"] for finding in json.loads(done.stdout)}
    assert found["finite differences"] is True and sum(value is True for value in found.values()) == 13
    listed = {row["name"]: row for row in json.loads(run(["reward", "list", "--json"], tmp_path).stdout)}
    assert listed[name]["sees"] == "latent and prompt" and listed[name]["reads"] == 77


def test_a_plugins_latent_reward_says_whose_latents(folder):
    assert run(["reward", "check", "calm.py:Calm"], folder).returncode == 0
    (folder / "mute.py").write_text(PLUGIN.replace("    latents = ", "    other = ").replace('"calm"', '"mute"'))
    done = run(["reward", "check", "mute.py:Calm"], folder)
    assert done.returncode == 2 and "sees latents and does not say whose" in " ".join(done.stderr.split())


def test_noise_above_the_last_timestep_is_always_the_same(tmp_path):
    options = make_small_reward("lrm-1.5", tmp_path)
    last, noised = (rewards.build("lrm-1.5", options | {"timestep": t}) for t in (1, 201))
    prompts = ["a bus", "two cats", "a bird"]
    scores = noised.score(latents(), prompts)
    assert torch.equal(scores, noised.score(latents(), prompts)) and not torch.allclose(
        scores, last.score(latents(), prompts)
    )
    with pytest.raises(RecipeFault, match="timestep must be from 1 to 999, not 0"):
        rewards.build("lrm-1.5", options | {"timestep": 0})
