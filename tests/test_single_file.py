"""Single-file checkpoints in the original names, through the shipped configs."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_models import plain

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.models.single_file import CONFIGS, CROSS, KINDS, MMDIT, UNET, config_folder, kind_of, load_single_file

# published counts of the full-size parts
COUNTS = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("sd3-medium", "transformer"): 2_028_328_000,
}


@pytest.mark.parametrize(("kind", "part"), COUNTS)
def test_shipped_configs_are_the_full_size_models(kind, part):
    config = json.loads((CONFIGS / kind / part / "config.json").read_text())
    with torch.device("meta"):
        if "_class_name" in config:
            net = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            settings = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
            net = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**settings))
    assert sum(p.numel() for p in net.parameters()) == COUNTS[kind, part]


@pytest.mark.parametrize("kind", KINDS)
def test_config_folders_are_whole_pipelines(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = config_folder(kind)
    index = json.loads((folder / "model_index.json").read_text())
    for part, (library, cls) in ((k, v) for k, v in index.items() if isinstance(v, list) and v[0]):
        assert (folder / part).is_dir(), part
        if cls == "CLIPTokenizer":
            words = transformers.CLIPTokenizer.from_pretrained(str(folder / part))
            assert words("a cat").input_ids == [49406, 320, 2368, 49407] and words.model_max_length == 77
        elif library == "diffusers" and "Scheduler" in cls:
            assert getattr(diffusers, cls).from_pretrained(folder, subfolder=part).config.get("clip_sample") is not True
    assert config_folder(kind) == folder and [p.name for p in folder.parent.iterdir()] == [kind]


def resnet(name: str) -> str:
    table = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    table |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    return re.sub(r"^(\w+)", lambda found: table[found[1]], name)


def original_unet(name: str, each: int, blocks: int) -> str:
    """diffusers' name of a UNet layer in CompVis' code; ``each`` layers to a block and one that changes the size."""
    heads = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0"}
    heads |= {"time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
    for old, new in heads.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{found[3] if found[1] == 'attentions' else resnet(found[3])}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    way, block, what, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if what == "downsamplers":
        return f"input_blocks.{(each + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        has_attention = block > 0
        return f"output_blocks.{(each + 1) * block + each}.{1 + has_attention}.{rest}"
    number = (each + 1) * block + layer + (way == "down")
    side = "input_blocks" if way == "down" else "output_blocks"
    return f"{side}.{number}.{1 if what == 'attentions' else 0}.{rest if what == 'attentions' else resnet(rest)}"


def original_vae(name: str, blocks: int) -> str:
    name = re.sub(r"(encoder)\.down_blocks\.(\d)\.", r"\1.down.\2.", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
    for old, new in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
    name = (
        name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    )
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def write_original(pipe, path: Path) -> None:
    """An SD 1.x pipeline as one file with CompVis' names."""
    each, blocks = pipe.unet.config.layers_per_block, len(pipe.unet.config.block_out_channels)
    state = {
        f"model.diffusion_model.{original_unet(name, each, blocks)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    for name, value in pipe.vae.state_dict().items():
        new = original_vae(name, len(pipe.vae.config.block_out_channels))
        # the original's attention is made of 1x1 convolutions
        is_linear = ".attn_1." in new and ".norm." not in new and new.endswith("weight")
        state[f"first_stage_model.{new}"] = value[:, :, None, None] if is_linear else value
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def test_an_original_file_gives_the_pipelines_image(small, tmp_path):
    pipe = plain(small("sd15"))
    write_original(pipe, tmp_path / "model.safetensors")
    assert kind_of(tmp_path / "model.safetensors") == "sd15"
    loaded = load_single_file(tmp_path / "model.safetensors", dtype=torch.float32, config=small("sd15"))
    loaded.set_progress_bar_config(disable=True)

    def image(which):
        generator = torch.Generator().manual_seed(3)
        return np.asarray(which("the cat", num_inference_steps=3, generator=generator).images[0], dtype=int)

    assert np.abs(image(pipe) - image(loaded)).max() <= 1


def headers(tmp_path, **shapes):
    path = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


XL = "conditioner.embedders.1.model.ln_final.weight"
KNOWN = {
    "sd15": {UNET: (1, 4, 1, 1), CROSS: (1, 768)},
    "sd21": {UNET: (1, 4, 1, 1), CROSS: (1, 1024)},
    "sdxl": {UNET: (1, 4, 1, 1), XL: (1,)},
    "sd3-medium": {MMDIT: (1,)},
    "sd35-medium": {MMDIT: (1,), MMDIT.replace("attn.", "attn2."): (1,)},
    "sd35-large": {MMDIT: (1,), MMDIT.replace("blocks.0", "blocks.37"): (1,)},
}


@pytest.mark.parametrize("kind", KNOWN)
def test_kinds_are_told_by_their_headers(kind, tmp_path):
    path = headers(tmp_path, **KNOWN[kind])
    assert kind_of(path) == kind
    assert kind != "sd21" or kind_of(path, "epsilon") == "sd21-base"


def test_other_files_are_one_sentence(tmp_path):
    cases = {
        "is a LoRA": headers(tmp_path, **{"lora_unet_x.lora_down.weight": (1,)}),
    }
    for expected, path in cases.items():
        with pytest.raises(EnvironmentFault, match=expected):
            kind_of(path)
    with pytest.raises(EnvironmentFault, match=r"inpainting or edit model \(9 input channels\)"):
        kind_of(headers(tmp_path, **{UNET: (1, 9, 1, 1)}))
    with pytest.raises(EnvironmentFault, match="no Stable Diffusion checkpoint"):
        kind_of(headers(tmp_path, other=(1,)))
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match=r"is no \.safetensors file"):
        load_family(str(tmp_path / "a.ckpt"))
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(EnvironmentFault, match="was cut short"):
        load_family(str(tmp_path / "cut.safetensors"))


def test_prediction_type_can_be_said(small):
    family = load_family(ModelSource(str(small("sd2-base")), prediction_type="v_prediction"))
    assert family.scheduler_config["prediction_type"] == "v_prediction"
