"""Single-file checkpoints in the original names, through the shipped configs."""

import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from original_names import write_original
from safetensors.torch import load_file, save_file
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


# widths of small models are not the real ones, by which SD 2 is told from SD 1
KIND_OF = {"sd15": ["sd15"], "sd2": ["sd15"], "sdxl": ["sdxl"], "sd3-no-t5": ["sd3-medium"], "sd35": ["sd35-medium"]}


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "sd3-no-t5", "sd35"])
def test_an_original_file_gives_the_pipelines_image(kind, small, tmp_path):
    without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd35" else {}
    pipe = plain(small(kind), **without)
    if kind.startswith("sd3"):
        # these files hold no projection of CLIP-L: it is the identity
        with torch.no_grad():
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(32))
    write_original(pipe, tmp_path / "model.safetensors")
    assert kind_of(tmp_path / "model.safetensors") in KIND_OF[kind]
    loaded = load_single_file(tmp_path / "model.safetensors", dtype=torch.float32, config=small(kind))
    loaded.set_progress_bar_config(disable=True)

    def image(which):
        generator = torch.Generator().manual_seed(3)
        return np.asarray(which("the cat", num_inference_steps=2, generator=generator).images[0], dtype=int)

    expected = image(pipe)
    assert np.abs(expected - image(loaded)).max() <= 1 and expected.std() > 1


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


def test_a_file_without_some_of_its_layers_is_one_sentence(small, tmp_path):
    """It ended as a fault of sdo itself."""
    pipe = plain(small("sd35"), text_encoder_3=None, tokenizer_3=None)
    write_original(pipe, tmp_path / "whole.safetensors")
    state = {k: v for k, v in load_file(tmp_path / "whole.safetensors").items() if "joint_blocks.1." not in k}
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(EnvironmentFault, match=r"short.safetensors lacks weights of a model of its kind"):
        load_single_file(tmp_path / "short.safetensors", dtype=torch.float32, config=small("sd35"))
