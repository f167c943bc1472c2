"""Kohya, peft and merged files: read back by the programs' own loaders, the images are those of the LoRA."""

import json
import os
import re
from functools import cache
from pathlib import Path

import diffusers
import entry
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from original_names import write_original
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FAMILY_OF, plain

from sdo_cli.exporting.kohya import base_version, guess_family, kohya_metadata
from sdo_cli.models.load import load_family
from sdo_cli.models.lora_files import LoraLayer
from sdo_cli.models.lora_read import read_diffusers

CONFIGS = Path(__file__).parent.parent / "sdo_cli" / "models" / "configs"
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDE = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def sdo(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return entry.run(arguments, cwd=cwd, env=environment)


def picture(pipe, seed=4):
    image = pipe("the cat", num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(seed))
    return np.asarray(image.images[0], dtype=int)


@pytest.fixture(scope="module")
def run_of(small, tmp_path_factory):
    """run_of(kind) -> a run folder as `sdo finetune` leaves it: rank 16, alpha 4, text encoders too, nothing zero."""
    made = {}

    def run(kind):
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp("run") / kind
        family = load_family(str(small(kind)))
        generator = torch.Generator().manual_seed(7)
        targets = list(family.lora_targets) if kind == "sd3" else WIDE
        for part, names in (
            (family.denoiser, targets),
            *((e, ["q_proj", "v_proj", "out_proj", "fc1"]) for e in family.text_encoders.values()),
        ):
            part.add_adapter(LoraConfig(r=16, lora_alpha=4, target_modules=names), adapter_name="default")
            with torch.no_grad():
                for name, p in part.named_parameters():
                    if "lora_" in name:
                        p.copy_(torch.randn(p.shape, generator=generator) * (0.25 if "lora_B" in name else 0.15))
        family.save_lora(folder)
        record = {"status": "finished", "model": str(small(kind)), "family": FAMILY_OF[kind]}
        (folder / "manifest.json").write_text(json.dumps(record))
        made[kind] = folder
        return folder

    return run


@pytest.fixture(scope="module")
def kohya_of(run_of, tmp_path_factory):
    """kohya_of(kind) -> what `sdo export` makes of that run."""
    folder = tmp_path_factory.mktemp("kohya")

    @cache
    def file(kind):
        done = sdo("export", run_of(kind), "--out", f"{kind}.safetensors", cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / f"{kind}.safetensors"

    return file


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_kohya_file_gives_the_same_image(kind, small, run_of, kohya_of, tmp_path):
    pipe, other = plain(small(kind)), plain(small(kind))
    base = picture(pipe)
    pipe.load_lora_weights(run_of(kind))
    other.load_lora_weights(kohya_of(kind))
    lora = picture(pipe)
    assert np.abs(lora - picture(other)).max() <= 1
    assert np.abs(lora - base).mean() > 2
    # alpha is read: with alpha = rank the picture is another
    state = load_file(kohya_of(kind))
    alphas = {key: value for key, value in state.items() if key.endswith(".alpha")}
    assert {value.item() for value in alphas.values()} == {4.0} and len(alphas) * 3 == len(state)
    save_file(state | {key: torch.tensor(16.0) for key in alphas}, tmp_path / "wrong.safetensors")
    other.unload_lora_weights()
    other.load_lora_weights(tmp_path / "wrong.safetensors")
    assert np.abs(lora - picture(other)).mean() > 2
    prefixes = {"sdxl": {"unet", "te1", "te2"}}.get(kind, {"unet", "te"})
    assert {key.split("_")[1] for key in state} == prefixes
    with safe_open(kohya_of(kind), "pt") as stream:
        metadata = stream.metadata()
    assert metadata["ss_network_dim"] == "16" and metadata["ss_network_alpha"] == "4.0"
    # the small SD 2 is not 1024 wide, so its version does not show
    version = {"sdxl": "sdxl_base_v1-0"}.get(kind, "sd_v1")
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, "False")


def test_sd_2_is_known_by_its_width():
    def layers(width):
        layer = LoraLayer(torch.zeros(2, width), torch.zeros(3, 2), 1.0)
        return {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": layer}}

    assert guess_family(layers(768)) == guess_family(layers(1024)) == "sd" and guess_family(layers(2048)) == "sdxl"
    assert base_version(layers(768), "sd", v_prediction=False) == "sd_v1"
    assert base_version(layers(1024), "sd", v_prediction=False) == "sd_v2"
    metadata = kohya_metadata(layers(1024), base_version(layers(1024), "sd", v_prediction=True), model="m", title="t")
    assert metadata["ss_v2"] == "True" and metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


def test_sd3_file_has_the_names_comfyui_reads(kohya_of):
    """comfy/lora.py: ``lora_transformer_`` and diffusers' module name; it never reads the alpha in metadata."""
    state = load_file(kohya_of("sd3"))
    assert {key.split("_")[1] for key in state} == {"transformer", "te1", "te2"}
    assert state["lora_transformer_transformer_blocks_0_attn_to_q.alpha"].item() == 4
    assert state["lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha"].item() == 4


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_sample_and_training_read_kohya_files_as_well(kind, small, run_of, kohya_of, tmp_path):
    for name, lora in (("one", run_of(kind)), ("two", kohya_of(kind))):
        words = ["the cat", "--model", small(kind), "--steps", 2, "-q", "--lora", lora, "--out", name]
        done = sdo("sample", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (diffusers.utils.load_image(str(tmp_path / name / "00000.png")) for name in ("one", "two"))
    assert np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max() <= 1
    recipe = f"model: {small(kind)}\nrewards: [colorfulness]\nprompts: {{lines: [x]}}\nmax_train_steps: 1\n"
    (tmp_path / "r.yaml").write_text(recipe + "num_inference_steps: 2\nlearning_rate: 1e-9\ntrain_batch_size: 1\n")
    words = [f"lora.start_from={kohya_of(kind)}", "lora.text_encoder=true", "--out", "run", "-q"]
    done = sdo("finetune", "--recipe", "r.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, then = (read_diffusers(place) for place in (run_of(kind), tmp_path / "run"))
    assert first.keys() == then.keys()
    for component, layers in first.items():
        assert layers.keys() == then[component].keys()
        for module, layer in layers.items():
            again = then[component][module]
            assert again.alpha == layer.alpha == 4 and torch.allclose(again.up, layer.up, atol=1e-6)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_back_from_kohya_to_diffusers(kind, small, run_of, kohya_of, tmp_path):
    words = ["export", kohya_of(kind), "--format", "diffusers", "--model", small(kind), "--out", "back"]
    done = sdo(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lora, back = plain(small(kind)), plain(small(kind))
    lora.load_lora_weights(run_of(kind))
    back.load_lora_weights(tmp_path / "back")
    assert np.abs(picture(lora) - picture(back)).max() <= 1
    assert {layer.alpha for layers in read_diffusers(tmp_path / "back").values() for layer in layers.values()} == {4}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_merged_pipeline_gives_the_same_image(kind, small, run_of, tmp_path):
    done = sdo("export", run_of(kind), "-f", "merged", "--lora-scale", 0.5, "--out", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipe, merged = plain(small(kind)), picture(plain(tmp_path / "m"))
    base = picture(pipe)
    pipe.load_lora_weights(run_of(kind), adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    assert np.abs(picture(pipe) - merged).max() <= 1
    assert np.abs(base - merged).mean() > 1
    assert sdo("sample", "x", "--model", "m", "--steps", 2, "-q", "--out", "o", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_peft_folders_load_with_peft(kind, small, run_of, tmp_path):
    done = sdo("export", run_of(kind), "--format", "peft", "--out", "p", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lora, pipe = plain(small(kind)), plain(small(kind))
    lora.load_lora_weights(run_of(kind))
    names = [path.name for path in (tmp_path / "p").iterdir()]
    assert len(names) == {"sd15": 2}.get(kind, 3)
    for name in names:
        setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), tmp_path / "p" / name).merge_and_unload())
    assert np.abs(picture(lora) - picture(pipe)).max() <= 1


BAD = {
    "no such thing": (["gone"], "no LoRA at gone"),
    "folder": (["."], "text.safetensors is no safetensors file"),
    "not a LoRA": (["text.safetensors"], "is no safetensors file"),
    "unknown format": (["x", "--format", "ckpt"], "--format: 'ckpt' is not one of kohya"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence(kind, tmp_path):
    (tmp_path / "text.safetensors").write_text("no")
    arguments, expected = BAD[kind]
    done = sdo("export", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.safetensors"]


def test_nothing_is_overwritten_and_the_family_is_asked_for(run_of, tmp_path):
    (tmp_path / "k.safetensors").write_text("mine")
    done = sdo("export", run_of("sd15"), "--out", "k.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr
    assert (tmp_path / "k.safetensors").read_text() == "mine"
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((run_of("sd15") / "pytorch_lora_weights.safetensors").read_bytes())
    done = sdo("export", bare, "--out", "b.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "give --family" in done.stderr
    assert sdo("export", bare, "--family", "sd", "--out", "b.safetensors", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd35"])
def test_merged_pipelines_have_the_published_names_and_words(kind, small, run_of, tmp_path):
    """With transformers 4, and in ComfyUI, an encoder under transformers 5's names starts at random, unsaid."""
    done = sdo("export", run_of(kind), "--format", "merged", "--out", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("text_encoder", "text_encoder_2"):
        files = list((tmp_path / "merged" / name).glob("*.safetensors"))
        keys = {key for file in files for key in load_file(file)}
        assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)
        assert bool(keys) == (name == "text_encoder" or kind != "sd15")
    for name in ("tokenizer", "tokenizer_2"):
        if not (folder := tmp_path / "merged" / name).is_dir():
            continue
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        assert len(vocab) > 49000 and len((folder / "merges.txt").read_text(encoding="utf-8").splitlines()) > 48000
    pipe = plain(tmp_path / "merged")
    one = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert bool(torch.isfinite(one).all())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_merging_into_half_precision_rounds_away_is_said(precision, small, run_of, tmp_path):
    for name in ("no", precision):
        words = ["--format", "merged", "--precision", name, "--lora-scale", "0.1", "--out", name]
        done = sdo("export", run_of("sd15"), *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("rounds away" in done.stdout) == (name != "no")
    before, whole, rounded = (
        {**load_file(folder / "unet" / WEIGHTS), **text_weights(folder)}
        for folder in (small("sd15"), tmp_path / "no", tmp_path / precision)
    )
    changed = [key for key, value in whole.items() if not torch.equal(value, before[key])]
    gap = sum((rounded[key].double() - whole[key]).square().sum() for key in changed)
    added = sum((whole[key].double() - before[key]).square().sum() for key in changed)
    told = float(re.search(rf"{precision} rounds away ([\d.]+)% of what the LoRA adds", done.stdout)[1])
    assert told == pytest.approx(100 * (gap / added).sqrt().item(), abs=0.06) and told > 0.1


WEIGHTS = "diffusion_pytorch_model.safetensors"


def text_weights(folder):
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "sd35"])
def test_a_checkpoint_file_holds_the_merged_model_in_the_original_names(kind, small, run_of, tmp_path):
    """Name by name and number by number what another writer of the original names makes of the merged folder."""
    for form in ("merged", "checkpoint"):
        out = f"x{'.safetensors' if form == 'checkpoint' else ''}"
        words = ["--format", form, "--model", small(kind), "--out", out]
        done = sdo("export", run_of(kind), *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    pipe = plain(tmp_path / "x")
    write_original(pipe, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / name) for name in ("x.safetensors", "theirs.safetensors"))
    if kind == "sd35":
        words = {k: v for k, v in pipe.text_encoder_3.state_dict().items() if k != "encoder.embed_tokens.weight"}
        theirs |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in words.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_file_is_read_back_by_diffusers(small, run_of, tmp_path):
    for form, out in (("merged", "x"), ("checkpoint", "x.safetensors")):
        assert sdo("export", run_of("sd15"), "--format", form, "--out", out, cwd=tmp_path).returncode == 0
    options = {"config": str(tmp_path / "x"), "subfolder": "unet"}
    unet = diffusers.UNet2DConditionModel.from_single_file(str(tmp_path / "x.safetensors"), **options)
    there = plain(tmp_path / "x").unet.state_dict()
    assert unet.state_dict().keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in unet.state_dict().items())


def test_the_embedded_model_is_no_checkpoint_file(tmp_path):
    words = ["embedded:student", "--model", "embedded", "--format", "checkpoint", "--out", "x.safetensors"]
    done = sdo("export", *words, cwd=tmp_path)
    assert done.returncode == 2 and "sizes of its own" in done.stderr and not list(tmp_path.iterdir())
