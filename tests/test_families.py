"""Every family on small random pipelines: the images are plain diffusers', the interface is kept."""

import json
import os
import shutil
from functools import cache

import diffusers
import entry
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from small_models import FAMILY_OF, KINDS, plain

from sdo_cli.drawing.draw import DrawSettings, draw_images
from sdo_cli.drawing.prompts import PromptEmbeddings, cut_prompts
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.models.load import ModelSource, load_family

PROMPTS = ["a cat on the dog", "the dog"]
# what each kind's own scheduler is called here
OWN_SOLVER = {"sd15": "pndm", "sdxl": "euler"} | dict.fromkeys(("sd2", "sd2-base"), "ddim")


def sdo(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return entry.run(arguments, cwd=cwd, env=environment)


def drawn(pipe, seed=5, **options):
    """[prompts, H, W, 3] as 8-bit numbers."""
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0} | options
    images = [
        pipe(prompt, generator=torch.Generator().manual_seed(seed + j), **settings).images[0]
        for j, prompt in enumerate(PROMPTS)
    ]
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.fixture(scope="module")
def family_of(small):
    """family_of(kind) -> the family, for those who change nothing in it."""
    return cache(lambda kind: load_family(str(small(kind))))


def ours(folder):
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(folder.glob("[0-9]*.png"))])


@pytest.mark.parametrize("kind", KINDS)
def test_sample_equals_plain_diffusers(kind, small, tmp_path):
    words = ["--model", small(kind), "--seed", 5, "--steps", 3, "--guidance", 4, "--out", "out", "-q"]
    done = sdo("sample", *PROMPTS, *words, "--solver", OWN_SOLVER.get(kind, "auto"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = drawn(plain(small(kind)))
    assert np.abs(ours(tmp_path / "out") - theirs).max() <= 2
    # the two prompts, and another noise, give clearly other pictures
    assert np.abs(theirs[0] - theirs[1]).mean() > 5


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_negative_prompt_and_size_as_in_plain_diffusers(kind, small, family_of):
    family, pipe = family_of(kind), plain(small(kind))
    settings = DrawSettings(
        OWN_SOLVER.get(kind, "auto"), num_inference_steps=2, guidance_scale=3.0, negative_prompt="the dog",
        height=48, width=96,
    )  # fmt: skip
    images = torch.cat(list(draw_images(family, PROMPTS, lambda j: torch.Generator().manual_seed(5 + j), settings)))
    assert images.shape == (2, 3, 48, 96)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 48, "width": 96}
    theirs = drawn(pipe, negative_prompt="the dog", **options)
    assert np.abs((images.permute(0, 2, 3, 1).numpy() * 255).round() - theirs).max() <= 2
    assert np.abs(theirs - drawn(pipe, **options)).mean() > 1


def test_an_empty_negative_prompt_of_sdxl_is_zeros(family_of):
    family = family_of("sdxl")
    assert all(not value.any() for value in family.encode_negative("").values())
    assert all(value.any() for value in family.encode_negative("the dog").values())


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_diffusers_with_gradient(kind, small, family_of):
    family, vae = family_of(kind), diffusers.AutoencoderKL.from_pretrained(small(kind), subfolder="vae")
    assert family.name == FAMILY_OF[kind]
    latents = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = family.decode(latents)
    config = vae.config
    with torch.no_grad():
        raw = vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    assert torch.allclose(images, VaeImageProcessor.denormalize(raw), atol=1e-5)
    images.mean().backward()
    assert latents.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3"])
def test_network_takes_a_timestep_per_sample(kind, family_of):
    """Each sample of a batch at a time of its own gives what it gives alone: the shortcut stage stands on this."""
    family = family_of(kind)
    x = torch.randn(3, *family.latent_shape(), generator=torch.Generator().manual_seed(1))
    t, condition = torch.tensor([900.0, 500.0, 20.0]), family.encode(["a cat", "the dog", "a dog on the cat"])
    with torch.no_grad():
        together = family.network(x, t, condition)
        for j in range(3):
            alone = family.network(x[j : j + 1], t[j : j + 1], {k: v[j : j + 1] for k, v in condition.items()})
            assert torch.allclose(together[j], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_prompts_are_encoded_once_and_the_encoders_freed(small, family_of):
    family = load_family(str(small("sdxl")))
    embed, calls = PromptEmbeddings(family), []
    count = family.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    embed.prepare([*PROMPTS, *PROMPTS], "", torch.device("cpu"))
    assert len(calls) == 2 and family.text_encoders == {} and family.pipeline.text_encoder_2 is None
    count.remove()
    again = embed(PROMPTS[::-1])
    assert again["text_embeds"].shape == (2, 24)
    fresh = family_of("sdxl").encode(PROMPTS[::-1])
    assert all(torch.allclose(again[key], fresh[key], atol=1e-6) for key in fresh)
    with pytest.raises(RuntimeError, match="encoders are freed"):
        embed(["a new one"])


def test_t5_can_be_left_out(small, family_of):
    family = load_family(ModelSource(str(small("sd3")), t5=False))
    assert family.pipeline.text_encoder_3 is None
    whole = family_of("sd3").encode(PROMPTS)["encoder_hidden_states"]
    without = family.encode(PROMPTS)["encoder_hidden_states"]
    assert whole.shape == without.shape and without[:, 77:].abs().max() == 0 and whole[:, 77:].abs().max() > 0
    assert torch.equal(whole[:, :77], without[:, :77])


def test_another_vae(small, family_of):
    family = load_family(ModelSource(str(small("sd15")), vae=str(small("sd2") / "vae")))
    expected = family_of("sd2").vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in family.vae.state_dict().items())


def test_the_vae_of_sdxl_stays_in_fp32_unless_it_is_the_repaired_one(small, tmp_path):
    family = load_family(str(small("sdxl")), dtype=torch.bfloat16)
    family.to(torch.device("cpu"), torch.bfloat16)
    assert family.vae.dtype == torch.float32 and family.denoiser.dtype == torch.bfloat16
    fixed = diffusers.AutoencoderKL.from_pretrained(small("sdxl"), subfolder="vae")
    fixed.register_to_config(force_upcast=False)
    fixed.save_pretrained(tmp_path / "vae")
    family = load_family(ModelSource(str(small("sdxl")), vae=str(tmp_path / "vae")))
    family.to(torch.device("cpu"), torch.bfloat16)
    assert family.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(kind, dtype, small, family_of):
    settings = DrawSettings(num_inference_steps=2, guidance_scale=2.0)

    def draw(family):
        return next(draw_images(family, PROMPTS[:1], lambda j: torch.Generator().manual_seed(3), settings))

    family = load_family(str(small(kind)), dtype=dtype)
    family.to(torch.device("cpu"), dtype)
    half, full = draw(family), draw(family_of(kind))
    assert half.dtype == torch.float32 and 0 < (half - full).abs().mean() < 0.03


def test_what_overflows_fp16_stays_in_fp32(small):
    """T5's last projections: transformers names them, and pictures of SD 3 turn black without it."""
    family = load_family(str(small("sd3")), dtype=torch.float16)
    family.to(torch.device("cpu"), torch.float16)
    kinds = {name: p.dtype for name, p in family.pipeline.text_encoder_3.named_parameters()}
    wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert wide and wide == {name for name in kinds if ".wo." in name}


def test_fp16_files_are_found(small, tmp_path):
    """A folder that holds only the fp16 variant, as the hub names it."""
    plain(small("sdxl"), torch_dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    family = load_family(str(tmp_path / "half"))
    assert family.encode(PROMPTS)["text_embeds"].shape == (2, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_fused(kind, family_of):
    processors = {type(p).__name__ for p in family_of(kind).denoiser.attn_processors.values()}
    assert processors <= {"AttnProcessor2_0", "JointAttnProcessor2_0"}


def test_sizes_that_do_not_fit_are_refused(small, family_of, tmp_path):
    with pytest.raises(RecipeFault, match="width: must be a multiple of 16 for sd3 models, not 72"):
        family_of("sd3").latent_shape(64, 72)
    done = sdo("sample", "x", "--model", small("sd3"), "--width", 72, "-q", cwd=tmp_path)
    assert done.returncode == 2 and "width: must be a multiple of 16" in done.stderr


def test_solvers_that_do_not_fit_are_refused(small, tmp_path):
    done = sdo("sample", "x", "--model", small("sd3"), "--solver", "ddim", "-q", cwd=tmp_path)
    assert done.returncode == 2 and "does not fit a flow-matching network" in done.stderr
    done = sdo("sample", "x", "--model", small("sd3"), "--eta", 0.5, "-q", cwd=tmp_path)
    assert done.returncode == 2 and "takes no noise" in done.stderr


def test_a_pipeline_no_family_serves(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(EnvironmentFault, match="is a FluxPipeline, which no model family serves"):
        load_family(str(tmp_path))


def test_parts_sdo_has_no_use_for_need_not_be_there(small, tmp_path):
    """The published SD 1.5 names a safety checker and an image processor; neither is fetched."""
    shutil.copytree(small("sd15"), tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    assert load_family(str(tmp_path / "m")).name == "sd"


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "sd3-no-t5"])
def test_prompts_of_500_tokens_are_said_to_be_cut(kind, small):
    """CLIP reads 77 with its two marks, T5 256."""
    family = load_family(str(small(kind)))
    fits, longer, longest = " ".join(["cat"] * 75), " ".join(["cat"] * 76), " ".join(["cat"] * 498)
    assert cut_prompts(family, [fits, "🐯 on a 🟦"]) == []
    said = cut_prompts(family, [fits, longer, longest, longest])
    assert said[0].startswith("2 of 3 prompts: CLIP reads 77 tokens and not what follows; the first has 78: cat cat")
    t5 = [sentence for sentence in said if "T5 reads 256 tokens" in sentence]
    assert len(said) == 1 + len(t5) and len(t5) == (kind == "sd3")
    family.free_text_encoders()
    assert cut_prompts(family, [longest]), "the tokenizers are enough"


def test_every_command_says_what_is_cut(tmp_path):
    """The embedded model's text encoder reads 20 tokens."""
    long = " ".join(["tiger"] * 500)
    (tmp_path / "p.txt").write_text(f"a tiger\n{long}\n")
    words = ["--steps", 1, "--guidance", 1, "--out"]
    drawn = sdo("sample", long, *words, "s", cwd=tmp_path)
    evaluated = sdo("eval", "--prompts", "p.txt", "--rewards", "colorfulness", *words, "e", cwd=tmp_path)
    recipe = ["max_train_steps=1", "train_batch_size=1", "num_inference_steps=2", "prompts.file=p.txt"]
    recipe += ["rewards=[colorfulness]", "validation.prompts={}", "validation.rewards=[]", "--out", "r"]
    trained = sdo("finetune", "--recipe", "quickstart", *recipe, cwd=tmp_path)
    for done in (drawn, evaluated, trained):
        assert done.returncode == 0 and done.stderr.count("CLIP reads 20 tokens") == 1, done.stderr
