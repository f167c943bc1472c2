"""Every family fine-tuned through the command, and the result loaded by plain diffusers."""

import dataclasses
import json
import os
import re
import sys
from functools import cache

import entry
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import KINDS, plain

from sdo_cli.drawing.draw import Noise, draw_images, draw_noise, draw_settings, encode_pair, make_path
from sdo_cli.gradients.outcome import Scored, Terms
from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.gradients.three_stage import three_stage
from sdo_cli.models.load import load_family, source_of
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.card import how_to_load
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import denoise_path
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job
from sdo_cli.training.loop import train
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import prepare

RECIPE = """
model: {model}
rewards: [colorfulness]
prompts: {{lines: [a cat on the dog, the dog, a dog on the cat]}}
max_train_steps: 2
train_batch_size: 2
num_inference_steps: 3
guidance_scale: 3.0
learning_rate: 2e-2
lora: {{rank: 4, alpha: 2}}
validation:
  prompts: {{lines: [the cat]}}
  grid_prompts: 0
"""


# one sample and two calls a step: fp16 is slow on a CPU
LIGHT = ["train_batch_size=1", "num_inference_steps=2"]


def sdo(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return entry.run(arguments, cwd=cwd, env=environment)


def recipe_file(folder, model):
    (folder / "mine.yaml").write_text(RECIPE.format(model=model))
    return folder / "mine.yaml"


def prepared(folder, model, *overrides) -> Job:
    return prepare(load_recipe(str(recipe_file(folder, model)), list(overrides)))[0]


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


@pytest.fixture(scope="module")
def run_of(small, tmp_path_factory):
    """run_of(kind) -> the folder of the recipe's two steps by the command."""

    @cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        done = sdo("finetune", "--recipe", recipe_file(folder, small(kind)), "--out", "run", "-q", cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / "run"

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_finetuned_and_loaded_by_plain_diffusers(kind, small, run_of, tmp_path):
    """The lines of Python on the model card give `sdo sample`'s image."""
    run = run_of(kind)
    words = ["--model", small(kind), "--steps", 4, "--guidance", 3, "--seed", 9, "-q"]
    drawn = sdo("sample", "the cat", *words, "--lora", run, "--out", "tuned", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr

    def theirs():
        generator = torch.Generator().manual_seed(9)
        image = pipe("the cat", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
        return np.asarray(image, dtype=int)

    card = (run / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    pipe = names["pipe"]
    tuned = theirs()
    assert np.abs(pixels(tmp_path / "tuned" / "00000.png") - tuned).max() <= 2
    pipe.unload_lora_weights()
    assert np.abs(tuned - theirs()).mean() > 0.3
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as stream:
        metadata = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert {value for key, value in metadata.items() if key.endswith("lora_alpha")} == {2}


def test_the_card_says_every_choice_of_the_recipe(small, tmp_path):
    """Solver, kind of prediction and VAE, too: without them the LoRA meets another sampler than it was trained with."""
    folder = small("sd2")
    words = ["solver=dpm++2m-karras", "prediction_type=v_prediction", f"vae={folder}/vae"]
    loaded = load_recipe(str(recipe_file(tmp_path, folder)), words)
    lines = how_to_load(loaded.recipe, prepare(loaded)[0].family, tmp_path)
    names = {}
    exec(lines.replace("pipe.load_lora_weights", "print"), names)
    config = names["pipe"].scheduler.config
    assert type(names["pipe"].scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert config.use_karras_sigmas and config.prediction_type == "v_prediction"
    assert f'vae=AutoencoderKL.from_pretrained("{folder}/vae")' in lines


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["solver=ddim", "timesteps=[981, 600, 41]", "num_inference_steps=3"], {"timesteps": [981, 600, 41]}),
        (["solver=ipndm", "num_inference_steps=5"], {"num_inference_steps": 5}),
    ],
)
def test_the_cards_lines_draw_what_training_drew(words, steps, small, tmp_path):
    """A solver that diffusers lacks, and timesteps that its DDIM does not take."""
    loaded = load_recipe(str(recipe_file(tmp_path, small("sd15"))), words)
    family, settings, names = prepare(loaded)[0].family, draw_settings(loaded.recipe), {}
    exec(how_to_load(loaded.recipe, family, tmp_path).replace("pipe.load_lora_weights", "print"), names)
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    plain = load_family(source_of(loaded.recipe))
    ours = next(draw_images(plain, ["a cat"], lambda j: next(generators), settings))[0]
    options = {"guidance_scale": loaded.recipe.guidance_scale, "output_type": "pt", **steps}
    theirs = names["pipe"]("a cat", generator=next(generators), **options).images[0]
    assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.01


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_text_encoders_can_be_trained_too(kind, small, tmp_path):
    words = ["lora.text_encoder=true", "--out", "run", "-q"]
    done = sdo("finetune", "--recipe", recipe_file(tmp_path, small(kind)), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    parts = {"text_encoder"} if kind == "sd15" else {"text_encoder", "text_encoder_2"}
    assert {key.split(".")[0] for key in weights} - {"unet", "transformer"} == parts
    # the names of every published file, whatever the version of transformers
    assert all(".text_model.encoder.layers." in key for key in weights if key.startswith("text_encoder"))
    moved = [key for key, value in weights.items() if key.startswith("text_encoder") and "up" in key and value.any()]
    assert moved, "the text encoder's adapter did not move"
    words = ["--model", small(kind), "--steps", 4, "--guidance", 3, "--seed", 9, "-q"]
    assert sdo("sample", "the cat", *words, "--lora", "run", "--out", "tuned", cwd=tmp_path).returncode == 0
    pipe = plain(small(kind))
    pipe.load_lora_weights(tmp_path / "run")
    generator = torch.Generator().manual_seed(9)
    image = pipe("the cat", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
    assert np.abs(pixels(tmp_path / "tuned" / "00000.png") - np.asarray(image, dtype=int)).max() <= 2


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_text_encoder_gradients_against_finite_differences(kind, small, tmp_path):
    """The encoders run again in the shortcut stage: w_1 <v, e(x_1)> by central differences, in float64."""
    job = prepared(tmp_path, small(kind), "lora.text_encoder=true", "train_batch_size=1", "num_inference_steps=4")
    job.family.to(torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in job.parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    noise = draw_noise(job.family, job.draw_settings, [torch.Generator().manual_seed(4)])
    condition, negative = encode_pair(job.embed, job.draw_settings, ["a cat"])
    path = make_path(job.family, job.draw_settings, Noise(noise.initial.double()), condition, negative)
    v = torch.randn(path.x_0.shape, generator=generator, dtype=torch.float64)
    mode, weight = empty(path.route.calls, 1)
    mode[1], weight[1] = Mode.WEIGHTS, 1.0
    kept = {}

    @torch.no_grad()
    def call(i, x, t):
        kept[i] = (x, t)
        return path.denoise(x, t, path.rows)

    denoise_path(path, call)
    three_stage(path, Plan(mode, weight), lambda x_N, rows: Scored((v[rows] * x_N).flatten(1).sum(1), {}))
    encoders = list(job.family.text_encoders.values())
    assert any(p.grad.abs().max() > 0 for part in encoders for p in part.parameters() if p.grad is not None)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in job.parameters]
    claimed = sum((p.grad * d).sum() for p, d in zip(job.parameters, along, strict=True) if p.grad is not None)

    @torch.no_grad()
    def surrogate(move):
        for p, d in zip(job.parameters, along, strict=True):
            p.add_(d, alpha=move)
        value = coefficients_of(path.route).w[1] * (v * path.denoise(*kept[1], path.rows)).sum()
        for p, d in zip(job.parameters, along, strict=True):
            p.sub_(d, alpha=move)
        return value

    differences = (surrogate(1e-5) - surrogate(-1e-5)) / 2e-5
    assert claimed.item() == pytest.approx(differences.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_starting_from_a_lora_goes_on_where_it_ended(kind, small, run_of, tmp_path):
    first = ["--recipe", recipe_file(tmp_path, small(kind)), "-q", f"lora.start_from={run_of(kind)}"]
    done = sdo("finetune", *first, "--out", "two", "learning_rate=1e-9", "max_train_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(f / "pytorch_lora_weights.safetensors") for f in (run_of(kind), tmp_path / "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    with safe_open(tmp_path / "two" / "pytorch_lora_weights.safetensors", "pt") as stream:
        metadata = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert {value for key, value in metadata.items() if key.endswith("lora_alpha")} == {2}
    missing = sdo("finetune", *first, "--out", "x", "lora.text_encoder=true", cwd=tmp_path)
    assert missing.returncode == 2 and "has no layers for text_encoder" in missing.stderr


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_full_finetuning_is_a_pipeline(kind, small, tmp_path):
    words = ["train=full", "learning_rate=1e-3", "mixed_precision=bf16", "--out", "run", "-q"]
    done = sdo("finetune", "--recipe", recipe_file(tmp_path, small(kind)), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    tuned, base = plain(tmp_path / "run" / "pipeline"), plain(small(kind))
    name = "transformer" if kind == "sd3" else "unet"
    pairs = list(zip(getattr(tuned, name).parameters(), getattr(base, name).parameters(), strict=True))
    assert sum(not torch.equal(a, b) for a, b in pairs) > 0.9 * len(pairs)
    assert all(torch.equal(a, b) for a, b in zip(tuned.vae.parameters(), base.vae.parameters(), strict=True))
    drawn = sdo("sample", "x", "--model", "run/pipeline", "--steps", 2, "-q", "--out", "o", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr


def test_full_finetuning_refuses_what_needs_an_adapter(small, tmp_path):
    words = ["train=full", "kl_weight=0.1", "lora.text_encoder=true", "--dry-run"]
    done = sdo("finetune", "--recipe", recipe_file(tmp_path, small("sd15")), *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "kl_weight: needs the base model beside" in done.stderr and "lora.text_encoder: belongs to" in done.stderr


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_fp16_finds_its_scale_and_agrees_with_fp32(kind, small, tmp_path):
    """Same draws: the gradient in fp16, unscaled, points where the fp32 one points; adapters stay in fp32."""
    found = {}
    for precision in ("no", "fp16"):
        job = prepared(tmp_path, small(kind), f"mixed_precision={precision}", "max_train_steps=1", *LIGHT)
        assert all(p.dtype == torch.float32 for p in job.parameters)
        with torch.no_grad():
            for number, parameter in enumerate(job.parameters):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        before = [p.detach().clone() for p in job.parameters]
        result = next(train(job))
        assert not result.skipped and np.isfinite(result.grad_norm)
        moved = torch.cat([(a - b).flatten() for a, b in zip(job.parameters, before, strict=True)])
        found[precision] = (result.grad_norm, moved)
    assert found["fp16"][0] == pytest.approx(found["no"][0], rel=0.05)
    # Adam's first step is a step by the sign of each entry
    agree = (found["fp16"][1].sign() == found["no"][1].sign()).float().mean()
    assert agree > 0.9


def test_an_fp16_overflow_is_skipped_and_the_scale_halved(small, tmp_path, monkeypatch):
    monkeypatch.setattr("sdo_cli.optimizers.stepper.FIRST_SCALE", 2.0**40)
    job = prepared(tmp_path, small("sd15"), "mixed_precision=fp16", "max_train_steps=2", *LIGHT)
    before = [p.detach().clone() for p in job.parameters]
    results = list(train(job))
    assert len(results) == 2 and all(result.skipped for result in results)
    assert all(torch.equal(a, b) for a, b in zip(job.parameters, before, strict=True))
    assert results[0].learning_rate == results[-1].learning_rate


def test_the_running_mean_is_what_is_kept(small, tmp_path):
    """EMA by its definition, with diffusers' decay min(decay, (1 + n) / (10 + n))."""
    job = prepared(tmp_path, small("sd15"), "ema_decay=0.9", "max_train_steps=3", *LIGHT)
    seen = [[p.detach().clone() for p in job.parameters]]
    for number, _ in enumerate(train(job)):
        if number < 2:
            seen.append([p.detach().clone() for p in job.parameters])
    raw = prepared(tmp_path, small("sd15"), "max_train_steps=3", *LIGHT)
    list(train(raw))
    seen.append([p.detach() for p in raw.parameters])
    mean = seen[0]
    for n, weights in enumerate(seen[1:]):
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        mean = [decay * m + (1 - decay) * w for m, w in zip(mean, weights, strict=True)]
    assert all(torch.allclose(p, m, atol=1e-6) for p, m in zip(job.parameters, mean, strict=True))
    assert any(not torch.allclose(p, r, atol=1e-4) for p, r in zip(job.parameters, raw.parameters, strict=True))


def test_eight_bit_adamw_without_bitsandbytes_is_one_sentence(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    words = ["--recipe", recipe_file(tmp_path, small("sd15")), "optimizer=adamw8bit", "-q"]
    done = sdo("finetune", *words, cwd=tmp_path)
    assert done.returncode == 2 and "needs the package bitsandbytes" in done.stderr
    assert "Traceback" not in done.stderr


def gradient_of(job, scale=1.0, **changes):
    accumulate(dataclasses.replace(job, **changes), PromptOrder(job.prompts, 0), 0, scale=scale)
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in job.parameters])
    for parameter in job.parameters:
        parameter.grad = None
    return flat


@pytest.mark.parametrize("rule", ["sdo", "draft-k"])
def test_the_loss_scale_is_a_factor_of_parameter_gradients_alone(rule, small, tmp_path):
    job = prepared(tmp_path, small("sd15"), f"gradient.rule={rule}", "kl_weight=0.1")
    assert torch.allclose(gradient_of(job, scale=64.0), 64 * gradient_of(job), rtol=1e-4, atol=1e-7)
    assert Terms().scale == 1.0


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_checkpointing_changes_nothing_but_memory(kind, small, tmp_path):
    plain_job = prepared(tmp_path, small(kind))
    job = prepared(tmp_path, small(kind), "gradient_checkpointing=true", "vae_checkpointing=true")
    assert job.family.denoiser.is_gradient_checkpointing and job.family.vae.is_gradient_checkpointing
    assert torch.allclose(gradient_of(job), gradient_of(plain_job), rtol=1e-5, atol=1e-8)


def test_tiles_of_the_decoder_let_gradients_through(small):
    """Tiled decoding by central differences, in float64; checkpointing each tile changes nothing."""
    found = []
    for checkpointed in (False, True):
        family = load_family(str(small("sd15")))
        family.to(torch.device("cpu"), torch.float64)
        family.vae.tile_latent_min_size, family.vae.tile_sample_min_size = 8, 64
        family.vae.enable_tiling()
        if checkpointed:
            family.checkpoint_vae()
        generator = torch.Generator().manual_seed(0)
        z = (0.3 * torch.randn(1, 4, 12, 12, generator=generator, dtype=torch.float64)).requires_grad_()
        v = torch.randn(1, 3, 96, 96, generator=generator, dtype=torch.float64)

        def value(latents, family=family, v=v):
            return (v * family.vae.decode(latents, return_dict=False)[0]).sum()

        value(z).backward()
        direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6
        assert (z.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
        found.append(z.grad)
    assert torch.allclose(*found, rtol=1e-9)


@pytest.mark.parametrize(("trained", "tile"), [(1024, 512), (512, 512), (256, 256)])
def test_tiles_are_no_larger_than_512_pixels(small, trained, tile):
    """Those of SDXL would be the whole image: nothing is saved by that."""
    family = load_family(str(small("sdxl")))
    family.vae.tile_sample_min_size, family.vae.tile_latent_min_size = trained, trained // family.vae_factor
    family.tile_vae()
    assert family.vae.use_tiling
    assert (family.vae.tile_sample_min_size, family.vae.tile_latent_min_size) == (tile, tile // family.vae_factor)


def test_tiling_reaches_the_decoder_from_the_recipe(small, tmp_path):
    job = prepared(tmp_path, small("sd15"), "vae_tiling=true", "vae_checkpointing=true")
    assert job.family.vae.use_tiling
    assert torch.isfinite(gradient_of(job)).all()
