"""`sdo sample` and the embedded files against plain diffusers."""

import json
import os
import re
import subprocess
import sys

import entry
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from sdo_cli import embedded
from sdo_cli.drawing.draw import DrawSettings, draw_images
from sdo_cli.drawing.pictures import save_grid
from sdo_cli.models.load import load_family

PROMPTS = ["a tiger on a teal background", "a rose on a white background", "a rocket on a black background"]
EMOJI = embedded.folder("embedded", default="emoji")


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    """A run folder whose adapter does something visible: a short run at a high rate, alpha other than rank."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    words = (
        "max_train_steps=6 train_batch_size=2 num_inference_steps=4 learning_rate=2e-2 lr_warmup_steps=0 lora.rank=4"
    )
    done = sdo(
        "finetune", "--recipe", "quickstart", "--out", str(folder), "-q",
        *words.split(), "lora.alpha=8", "validation.num_prompts=2", "validation.grid_prompts=0",
        cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("scale", [None, 1.0, 0.5])
def test_sample_equals_plain_diffusers(scale, lora_folder, tmp_path):
    arguments = ["--seed", "11", "--steps", "8", "--guidance", "4", "--out", "out", "--batch-size", "2", "-q"]
    if scale is not None:
        arguments += ["--lora", str(lora_folder), "--lora-scale", str(scale)]
    done = sdo("sample", *PROMPTS, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    if scale is not None:
        pipe.load_lora_weights(str(lora_folder), adapter_name="mine")
        pipe.set_adapters(["mine"], [scale])
    for j, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(11 + j)
        theirs = pipe(prompt, num_inference_steps=8, guidance_scale=4.0, generator=generator).images[0]
        difference = np.abs(pixels(tmp_path / "out" / f"{j:05d}.png") - np.asarray(theirs, dtype=int))
        assert difference.max() <= 2


def test_noise_of_ddim_is_plain_diffusers_too(tmp_path):
    """--eta: every image's generator gives the initial noise first and then each step's, as the pipeline draws."""
    arguments = ["--seed", "3", "--steps", "6", "--guidance", "4", "--eta", "0.8", "--out", "out", "-q"]
    assert sdo("sample", *PROMPTS[:2], *arguments, cwd=tmp_path).returncode == 0
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    for j, prompt in enumerate(PROMPTS[:2]):
        generator, ours = torch.Generator("cpu").manual_seed(3 + j), pixels(tmp_path / "out" / f"{j:05d}.png")
        theirs = pipe(prompt, num_inference_steps=6, guidance_scale=4.0, eta=0.8, generator=generator).images[0]
        assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 2
        generator = torch.Generator("cpu").manual_seed(3 + j)
        without = pipe(prompt, num_inference_steps=6, guidance_scale=4.0, generator=generator).images[0]
        assert np.abs(ours - np.asarray(without, dtype=int)).max() > 20


def test_timesteps_are_those_of_plain_diffusers_and_are_kept_in_the_picture(tmp_path):
    words = ["--timesteps", "999,700,300", "--solver", "euler", "--seed", "4", "--guidance", "4", "--out", "out", "-q"]
    done = sdo("sample", PROMPTS[0], *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(4)
    theirs = pipe(PROMPTS[0], timesteps=[999, 700, 300], guidance_scale=4.0, generator=generator).images[0]
    picture = tmp_path / "out" / "00000.png"
    assert np.abs(pixels(picture) - np.asarray(theirs, dtype=int)).max() <= 2
    text = Image.open(picture).text["parameters"]
    assert "Steps: 3, Sampler: Euler, CFG scale: 4, Seed: 4, Size: 64x64" in text
    assert 'Timesteps: "999, 700, 300"' in text


def test_the_lora_changes_the_image_and_scale_zero_does_not(lora_folder, tmp_path):
    common = [PROMPTS[0], "--steps", "4", "--guidance", "1", "-q"]
    with_lora = ["--lora", str(lora_folder)]
    for name, extra in {"plain": [], "zero": [*with_lora, "--lora-scale", "0"], "one": with_lora}.items():
        assert sdo("sample", *common, *extra, "--out", name, cwd=tmp_path).returncode == 0
    plain, zero, one = (pixels(tmp_path / name / "00000.png") for name in ("plain", "zero", "one"))
    assert np.abs(plain - zero).max() <= 1
    assert np.abs(plain - one).max() > 8


def test_images_do_not_depend_on_the_batch(tmp_path):
    common = ["sample", *PROMPTS, "--steps", "3", "--guidance", "1", "-q", "--grid"]
    for size in ("1", "3"):
        assert sdo(*common, "--batch-size", size, "--out", size, cwd=tmp_path).returncode == 0
    for j in range(3):
        assert np.abs(pixels(tmp_path / "1" / f"{j:05d}.png") - pixels(tmp_path / "3" / f"{j:05d}.png")).max() <= 1
    assert (tmp_path / "3" / "grid.png").exists()


def test_every_solver_draws_the_same_picture():
    """The same noise: deterministic solvers agree on what is drawn, and differ from another noise."""
    family = load_family("embedded")

    def draw(solver, seed=11):
        settings = DrawSettings(solver=solver, num_inference_steps=20, guidance_scale=3.0)
        return next(draw_images(family, PROMPTS[:1], lambda j: torch.Generator().manual_seed(seed), settings))[0]

    reference = draw("ddim")
    far = (draw("ddim", seed=12) - reference).abs().mean()
    for solver in ("pndm", "unipc", "deis", "euler", "dpm++2m", "dpm++2m-karras"):
        assert (draw(solver) - reference).abs().mean() < 0.6 * far, solver


def test_the_png_says_how_it_was_made(lora_folder, tmp_path):
    """A1111's text, prompt by prompt; `sdo eval --images` finds the prompts in it, and leaves the sheet alone."""
    from sdo_cli.evaluation.folders import read_folder

    words = ["a tiger", "a rose, red", "--seed", "7", "-n", "2", "--steps", "2", "--guidance", "3", "--grid"]
    words += [
        "--lora",
        str(lora_folder),
        "--lora-scale",
        "0.5",
        "--negative-prompt",
        "grey",
        "--solver",
        "dpm++2m-karras",
    ]
    assert sdo("sample", *words, "--out", "s", "-q", cwd=tmp_path).returncode == 0
    text = Image.open(tmp_path / "s" / "00003.png").text["parameters"]
    assert text.splitlines()[:2] == [f"a rose, red <lora:{lora_folder.name}:0.5>", "Negative prompt: grey"]
    assert "Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 8, Size: 64x64" in text
    prompts, items, _notes = read_folder(tmp_path / "s", None)
    assert [p.text for p in prompts.prompts] == ["a tiger", "a rose, red"]
    assert [(i.file, i.prompt, i.seed_index) for i in items][2:] == [("00002.png", 1, 0), ("00003.png", 1, 1)]


def test_images_are_never_overwritten(tmp_path):
    arguments = ["sample", PROMPTS[0], "--steps", "2", "--guidance", "1", "-q", "--out", "o"]
    assert sdo(*arguments, cwd=tmp_path).returncode == 0
    kept = (tmp_path / "o" / "00000.png").read_bytes()
    again = sdo(*arguments, "--seed", "3", cwd=tmp_path)
    assert again.returncode == 2 and "holds images already" in again.stderr
    assert (tmp_path / "o" / "00000.png").read_bytes() == kept


def test_json_names_the_files(tmp_path):
    done = sdo("sample", PROMPTS[0], "--steps", "2", "--guidance", "1", "--json", "--grid", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert [(tmp_path / name).is_file() for name in (*record["images"], record["grid"])] == [True, True]
    first = json.loads(done.stderr.splitlines()[0])["note"]
    assert re.fullmatch(r"embedded on the CPU, \d+ threads?; 1 image of 2 steps", first)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample"], "no prompt; write one in quotes"),
        (
            ["sample", "x", "--steps", "0", "--solver", "heun"],
            "--solver: unknown solver 'heun'; choose one of auto, ddim",
        ),
        (["sample", "x", "--eta", "2"], "--eta: must be between 0 and 1, not 2"),
        (
            ["sample", "x", "--eta", "0.5", "--solver", "euler"],
            "--eta: is the noise of ddim, tcd; solver euler takes none",
        ),
        (["sample", "x", "--timesteps", "800,x"], "--timesteps: '800,x' is no list of whole numbers; write 999,749"),
        (["sample", "x", "--timesteps", "100,800"], "--timesteps: must fall from the noisiest"),
        (
            ["sample", "x", "--timesteps", "800,100", "--steps", "4"],
            "--timesteps: names 2 steps, num_inference_steps is 4",
        ),
        (["sample", "x", "--timesteps", "1000", "--solver", "ddim"], "timestep 1000 is no whole number from 999 to 0"),
        (["sample", "x", "--timesteps", "800", "--solver", "pndm"], "solver 'pndm' takes no timesteps"),
        (["sample", "x", "--prompts-file", "gone"], "--prompts-file: no file gone"),
        (["sample", "x", "--model", "./gone"], "no model at ./gone"),
        (["sample", "x", "--lora", "gone", "-q"], "no LoRA at gone"),
        (["sample", "x", "--lora", ".", "-q"], ". holds no LoRA"),
        (["sample", "x", "--lora", "runs/gone", "-q"], "cannot load the LoRA runs/gone"),
        (["sample", "x", "--height", "-8", "--guidance", "1001"], "--guidance: must be between 0 and 1000, not 1001"),
        (["sample", "x", "--guidance", "nan"], "--guidance: 'nan' is no plain number"),
        (["sample", "x", "--seed", str(2**64)], "--seed: must be between 0 and"),
        (["sample", "x", "--model", "embedded:clip"], "is a folder without model_index.json"),
        (["sample", "x", "--model", "embedded:nope"], "no embedded model 'nope'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, expected, tmp_path):
    done = sdo(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_that_trained_all_weights_is_a_model_and_no_lora(tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
    done = sdo("sample", "x", "--lora", "run", cwd=tmp_path)
    assert done.returncode == 2 and "draw with --model run/pipeline" in done.stderr


def test_embedded_files_are_small_and_carry_no_pickle():
    files = [p for p in embedded.WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_the_tokenizer_knows_every_prompt_word_as_one_token():
    from sdo_cli.recipe.prompts import read_prompts
    from sdo_cli.recipe.schema import PromptSource

    tokenizer = load_family("embedded").tokenizer
    for line in read_prompts(PromptSource(file="emoji-train"), None)[::25]:
        ids = tokenizer(line).input_ids
        assert len(ids) == 2 + len(line.replace("-", " - ").split())
    assert tokenizer.model_max_length == 20 and max(tokenizer.get_vocab().values()) == tokenizer.eos_token_id


def test_the_pipeline_index_is_stable_diffusions():
    index = json.loads((EMOJI / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    scheduler = DDIMScheduler.from_pretrained(EMOJI, subfolder="scheduler")
    assert scheduler.config.clip_sample is False and scheduler.config.beta_schedule == "scaled_linear"


def test_decode_gives_unit_range_with_gradient():
    family = load_family("embedded")
    latents = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = family.decode(latents)
    assert images.shape == (2, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    images.mean().backward()
    assert latents.grad.abs().max() > 0


def test_grid_has_a_row_per_label(tmp_path):
    rows = [torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)]
    save_grid(rows, ["before", "after"], tmp_path / "g.png")
    width, height = Image.open(tmp_path / "g.png").size
    assert height == 2 * 132 + 4 and width > 3 * 128
    save_grid(rows, ["before", "after"], tmp_path / "h.png", captions=["a tiger on a light teal background", "b", "c"])
    assert Image.open(tmp_path / "h.png").size == (width, height + 2 * 14)


def test_another_package_called_rewards_is_one_sentence(tmp_path):
    (tmp_path / "rewards.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "sdo_cli", "finetune", "--recipe", "quickstart"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "another package" in done.stderr and "Traceback" not in done.stderr
