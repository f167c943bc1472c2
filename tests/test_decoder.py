"""A small decoder for the score stage: values and gradients, refusals, cost, and what stays the model's own."""

import json

import entry
import pytest
import torch
from diffusers import AutoencoderTiny
from test_checkpoints import TINY, UNMEASURED

from sdo_cli.doctor.workload import workload_of
from sdo_cli.embedded import folder
from sdo_cli.errors import EnvironmentFault
from sdo_cli.estimate.stages import estimate
from sdo_cli.models.load import load_family
from sdo_cli.models.tiny_decoder import load_tiny_decoder
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training.loop import train
from sdo_cli.training.prepare import prepare
from sdo_cli.weights.needs import needs_of

QUICK = ["train_batch_size=2", "num_inference_steps=4", "max_train_steps=2", *UNMEASURED]


@pytest.fixture(scope="module")
def family():
    return load_family("embedded")


@pytest.fixture(scope="module")
def latents(family):
    """What the embedded model draws."""
    job, _ = prepare(load_recipe("quickstart", [*QUICK, "train_batch_size=4", "num_inference_steps=10"]))
    from sdo_cli.training.batches import PromptOrder
    from sdo_cli.training.passes import accumulate

    return accumulate(job, PromptOrder(job.prompts, 0), 0)[0].x_N


def small_tiny(path, channels=4, stages=4, kind="AutoencoderTiny"):
    torch.manual_seed(0)
    widths, blocks = (8,) * stages, (1,) * stages
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=channels,
    )
    # of random weights it makes black; grey is what a random VAE makes
    tiny.decoder.layers[-1].bias.data.fill_(0.5)
    tiny.save_pretrained(path)
    if kind != "AutoencoderTiny":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"_class_name": kind}))
    return str(path)


def test_the_embedded_one_draws_nearly_the_same(family, latents):
    tiny = load_tiny_decoder("embedded:tiny", family, only_jacobian=False)
    gap = (tiny(latents) - family.decode(latents)).abs().mean().item()
    assert 1e-4 < gap < 0.06


def test_values_are_the_models_own_and_gradients_the_small_ones(family, latents):
    only = load_tiny_decoder("embedded:tiny", family, only_jacobian=True)
    # some pixels are saturated
    latents = 1.6 * latents
    x = latents.clone().requires_grad_()
    direction = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images = only(x)
    own = family.decode(latents)
    assert torch.equal(images.detach(), own)
    (found,) = torch.autograd.grad((direction * images).sum(), x)
    inside = (own > 0) & (own < 1)
    assert 0 < inside.float().mean() < 1
    y = latents.clone().requires_grad_()
    made = only.tiny.decode(y, return_dict=False)[0] / 2 + 0.5
    (expected,) = torch.autograd.grad((direction * inside * made).sum(), y)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    # and it points where the model's own decoder's does
    z = latents.clone().requires_grad_()
    (true,) = torch.autograd.grad((direction * family.decode(z)).sum(), z)
    assert torch.cosine_similarity(found.flatten(), true.flatten(), 0) > 0.5


def test_big_pictures_are_decoded_piece_by_piece(family, latents, monkeypatch):
    from sdo_cli.models import tiny_decoder

    only, sizes, decode = load_tiny_decoder("embedded:tiny", family, only_jacobian=True), [], family.decode
    monkeypatch.setattr(tiny_decoder, "PIXELS", 64 * 64 * 3)
    monkeypatch.setattr(type(family), "decode", lambda self, x: (sizes.append(len(x)), decode(x))[1])
    assert torch.allclose(only(latents), decode(latents), atol=1e-5)
    # a look at the first sample, once; then three and the rest
    assert sizes == [1, 3, 1]
    only(latents)
    assert sizes == [1, 3, 1, 3, 1]


def test_training_through_each(tmp_path):
    found = {}
    for decoder in ("full", "tiny", "tiny-jacobian"):
        job, _ = prepare(load_recipe("quickstart", [*QUICK, f"decoder={decoder}"]))
        found[decoder] = list(train(job))
    full, tiny, only = found.values()
    assert only[0].rewards == full[0].rewards and only[0].grad_norm != full[0].grad_norm
    assert tiny[0].rewards != full[0].rewards and tiny[0].grad_norm not in (full[0].grad_norm, only[0].grad_norm)


def test_the_gap_between_both_is_looked_at():
    words = ["rollout={}", *QUICK, "rollout.drift_steps=2", "max_train_steps=3", "gradient_accumulation_steps=2"]
    job, _ = prepare(load_recipe("quickstart", [*words, "decoder=tiny"]))
    steps = list(train(job))
    assert [step.decoder_gap is not None for step in steps] == [True, False, True]
    plain = list(train(prepare(load_recipe("quickstart", ["rollout={}", *QUICK, words[-1], "decoder=full"]))[0]))
    gap = plain[0].rewards["clip-embedded"] - steps[0].rewards["clip-embedded"]
    assert steps[0].decoder_gap["clip-embedded"] == pytest.approx(gap, abs=1e-5) and abs(gap) > 1e-6


def test_held_out_pictures_are_the_models_own(tmp_path):
    for decoder in ("full", "tiny"):
        out = tmp_path / decoder
        words = [*TINY, "learning_rate=1e-30", f"decoder={decoder}"]
        done = entry.run(["finetune", "--recipe", "quickstart", "--out", str(out), *words])
        assert done.returncode == 0, done.stderr
    tables = [json.loads((tmp_path / decoder / "validation.json").read_text()) for decoder in ("full", "tiny")]
    assert tables[0] == tables[1]
    pictures = [sorted((tmp_path / decoder / "samples").rglob("*.png")) for decoder in ("full", "tiny")]
    assert pictures[0] and [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]


REFUSED = {
    "nameless": (["decoder=tiny", "model=runwayml/x"], "tiny_decoder: is missing, and decoder tiny needs it"),
    "for nothing": (["tiny_decoder=taesd"], "tiny_decoder: is for decoder: tiny or tiny-jacobian"),
    "tiled": (["decoder=tiny", "vae_tiling=true"], "cuts the model's own decoder up"),
    "embedded": (["decoder=tiny", "tiny_decoder=embedded:clip"], "there is no embedded small decoder embedded:clip"),
    "unknown": (["decoder=small"], "decoder: 'small' is not one of full, tiny, tiny-jacobian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_recipes_that_are_refused(name, tmp_path):
    overrides, text = REFUSED[name]
    done = entry.run(["finetune", "--recipe", "quickstart", "--out", str(tmp_path / "run"), *overrides])
    assert done.returncode == 2 and text in done.stderr, done.stderr


def test_folders_that_are_refused(small, tmp_path):
    sd = load_family(str(small("sd15")))
    with pytest.raises(EnvironmentFault, match="reads 16 channels of a 8th of the size, this model's latents have 4"):
        load_tiny_decoder(small_tiny(tmp_path / "wide", 16), sd, only_jacobian=False)
    with pytest.raises(EnvironmentFault, match="is an AutoencoderKL, not the folder of an AutoencoderTiny"):
        load_tiny_decoder(small_tiny(tmp_path / "kl", kind="AutoencoderKL"), sd, only_jacobian=False)
    with pytest.raises(EnvironmentFault, match="taesdxl is for sdxl, and the model is sd") as fault:
        load_tiny_decoder("taesdxl", sd, only_jacobian=False)
    assert fault.value.remedy == "write tiny_decoder: taesd"
    file = tmp_path / "taesd.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match="is a file, not the folder"):
        load_tiny_decoder(str(file), sd, only_jacobian=False)


def test_a_decoder_of_other_latents_is_refused_at_once(family, latents, tmp_path):
    """Its channels and size may fit all the same."""
    torch.manual_seed(1)
    other = AutoencoderTiny.from_pretrained(folder("embedded:tiny"))
    for parameter in other.decoder.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    decode = load_tiny_decoder(str(tmp_path / "other"), family, only_jacobian=True)
    with pytest.raises(EnvironmentFault, match="does not decode this model's latents: pixels are 0"):
        decode(latents)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_every_family_takes_one(kind, small, tmp_path):
    channels = load_family(str(small(kind))).vae.config.latent_channels
    stages = load_family(str(small(kind))).vae_factor.bit_length()
    tiny = small_tiny(tmp_path / "tiny", channels, stages)
    words = [f"model={small(kind)}", "rewards=[colorfulness]", *QUICK, "solver=auto"]
    words += ["decoder=tiny-jacobian", f"tiny_decoder={tiny}"]
    steps = list(train(prepare(load_recipe("quickstart", words))[0]))
    assert all(step.grad_norm > 0 for step in steps)


def test_what_it_costs_at_full_size():
    """SD 1.5 at 512 px: the decoder's FLOPs and the peak of the score stage, by the estimator."""
    base = ["model=stable-diffusion-v1-5/stable-diffusion-v1-5", "rewards=[colorfulness]", *UNMEASURED]
    found = {}
    for decoder in ("full", "tiny", "tiny-jacobian"):
        words = [*base, f"decoder={decoder}", *([] if decoder == "full" else ["tiny_decoder=taesd"])]
        loaded = load_recipe("quickstart", words)
        stages = {stage.name: stage for stage in estimate(loaded.recipe, workload_of(loaded, on_cpu=False)).stages}
        found[decoder] = stages["score"]
    full, tiny, only = found.values()
    assert tiny.flops < 0.07 * full.flops and tiny.flops < only.flops < 0.6 * full.flops
    assert tiny.working < 0.2 * full.working and only.working < 0.2 * full.working


def test_it_is_among_the_weights_to_fetch():
    words = ["model=stable-diffusion-v1-5/stable-diffusion-v1-5", "decoder=tiny", "tiny_decoder=taesd", *UNMEASURED]
    needs = {need.what: need for need in needs_of(load_recipe("quickstart", words).recipe)}
    assert needs["tiny decoder"].source == "madebyollin/taesd" and needs["tiny decoder"].licence == "MIT"
