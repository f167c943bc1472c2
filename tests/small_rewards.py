"""Small random reward models in the real file formats: what a recipe's options point at."""

import itertools
import json
from functools import partial
from pathlib import Path

import torch
from reference_inputs import (
    BLIP_TEXT,
    BLIP_VISION,
    CLIP_SMALL,
    LRM_TEXT,
    LRM_UNET,
    MPS_SMALL,
    linear_of,
    random_state,
    random_text,
    write_bert_words,
)
from safetensors.torch import save_file

# every reward that has weights
CYCLES = ("cyclereward-combo", "cyclereward-i2t", "cyclereward-t2i")
WITH_WEIGHTS = ("clip-score", "aesthetic-v2", "hps-v2", "hps-v2.1", "pickscore-v1", "imagereward-v1", *CYCLES, "mps-v1")


def write_open_clip(folder: Path, config: dict, *, quick_gelu: bool = False, weights: bool = True) -> Path:
    """A folder as open_clip's ``local-dir:`` reads it."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    settings = config | ({"quick_gelu": True} if quick_gelu else {})
    normal = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    preprocess = normal | {"interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    if weights:
        net = open_clip.model.CLIP(**settings)
        save_file(random_state(net.state_dict()), folder / "open_clip_model.safetensors")
    return folder


def small_hf_clip(folder: Path | None = None, act: str = "gelu"):
    """A random ``transformers.CLIPModel`` of CLIP_SMALL's size."""
    from transformers import CLIPConfig, CLIPModel

    vision, text = CLIP_SMALL["vision_cfg"], CLIP_SMALL["text_cfg"]
    config = CLIPConfig(
        projection_dim=CLIP_SMALL["embed_dim"],
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "hidden_act": act,
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
        },
        text_config={
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": act,
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"], "vocab_size": 49408,
            "bos_token_id": 49406, "eos_token_id": 49407,
        },
    )  # fmt: skip
    net = CLIPModel(config).eval()
    net.load_state_dict(random_state(net.state_dict()))
    if folder is not None:
        net.save_pretrained(folder)
    return net


def make_small_reward(name: str, folder: Path) -> dict:
    """Options with which ``rewards.build(name, options)`` makes a small random reward."""
    folder.mkdir(parents=True, exist_ok=True)
    return MAKERS[name](folder)


def _clip(folder: Path) -> dict:
    return {"model": str(write_open_clip(folder / "clip", CLIP_SMALL, quick_gelu=True))}


def _aesthetic(folder: Path) -> dict:
    from rewards.aesthetic import predictor_head

    head = predictor_head(CLIP_SMALL["embed_dim"])
    state = {f"layers.{key}": value for key, value in random_state(head.state_dict()).items()}
    torch.save(state, folder / "head.pth")
    return _clip(folder) | {"head": str(folder / "head.pth")}


def _hps(folder: Path) -> dict:
    import open_clip

    net = open_clip.model.CLIP(**CLIP_SMALL)
    # as published: the weights beside what training left
    torch.save({"epoch": 1, "state_dict": random_state(net.state_dict())}, folder / "HPS_small.pt")
    model = write_open_clip(folder / "architecture", CLIP_SMALL, weights=False)
    return {"model": str(model), "checkpoint": str(folder / "HPS_small.pt")}


def _pickscore(folder: Path) -> dict:
    small_hf_clip(folder / "pickscore")
    return {"model": str(folder / "pickscore")}


def _imagereward(folder: Path) -> dict:
    torch.save(published_imagereward(), folder / "ImageReward.pt")
    return {"checkpoint": str(folder / "ImageReward.pt")} | _blip_text(folder)


def _cyclereward(folder: Path) -> dict:
    save_file(published_cyclereward(), folder / "model.safetensors")
    return {"checkpoint": str(folder / "model.safetensors")} | _blip_text(folder)


def _blip_text(folder: Path) -> dict:
    (folder / "med_config.json").write_text(json.dumps(BLIP_TEXT))
    write_bert_words(folder / "bert")
    return {"config": str(folder / "med_config.json"), "tokenizer": str(folder / "bert")}


def _mps(folder: Path) -> dict:
    net = small_hf_clip(folder / "clip")
    save_file(published_mps(net), folder / "mps.safetensors")
    return {"checkpoint": str(folder / "mps.safetensors"), "config": str(folder / "clip" / "config.json")}


def _lrm(version: str, folder: Path) -> dict:
    """As its authors publish it: the UNet and the encoders as diffusers and transformers save them, the rest beside."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(**LRM_UNET[version])
    unet.load_state_dict(random_state(unet.state_dict(), "unet."))
    unet.save_pretrained(folder / "lrm" / "unet")
    names = list(LRM_TEXT) if version == "lrm-xl" else list(LRM_TEXT)[:1]
    for name in names:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        encoder = kind(CLIPTextConfig(**LRM_TEXT[name]))
        encoder.load_state_dict(random_text(encoder.state_dict(), name))
        encoder.save_pretrained(folder / "lrm" / name)
    width, channels = LRM_TEXT[names[-1]]["hidden_size"], LRM_UNET[version]["block_out_channels"]
    features = linear_of("visual_projection", width, sum(channels) + channels[-1])
    table = {"visual_projection": {"weight": features}, "logit_scale": torch.tensor(2.6592)}
    if version == "lrm-1.5":
        table["text_projection"] = {"weight": linear_of("text_projection", width, width)}
    torch.save(table, folder / "lrm" / "state_dict.pt")
    return {"model": str(folder / "lrm")}


def published_mps(net) -> dict[str, torch.Tensor]:
    """A CLIP and random cross attention under the names of the file on the hub."""
    from rewards.mps_layers import CrossModel

    cross = CrossModel(**MPS_SMALL).state_dict()
    drawn = random_state(cross, "cross_model.") | {k: v for k, v in cross.items() if k.endswith("inv_freq")}
    # biases of these norms are no parameters: zeros
    drawn |= {k: torch.zeros_like(v) for k, v in cross.items() if k.endswith("norm.bias")}
    state = {f"mps.model.{name}": value for name, value in net.state_dict().items()}
    return state | {f"mps.cross_model.{name}": value for name, value in drawn.items()}


def published_imagereward() -> dict[str, torch.Tensor]:
    """Random weights under the published file's names, with the parts of it that scoring does not use."""
    return published_blip((0, 2, 4, 6, 7))


def published_cyclereward() -> dict[str, torch.Tensor]:
    return published_blip((0, 2, 4, 6, 8))


def published_blip(layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Args:
    layers: numbers of the head's.
    """
    width, hidden, deep = BLIP_VISION["embed_dim"], BLIP_TEXT["hidden_size"], BLIP_TEXT["intermediate_size"]
    patch, count = BLIP_VISION["patch_size"], (BLIP_VISION["img_size"] // BLIP_VISION["patch_size"]) ** 2 + 1
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, count, width), "norm.weight": (width,)}
    shapes |= {"norm.bias": (width,), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    for i in range(BLIP_VISION["depth"]):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    text = {
        "embeddings.word_embeddings.weight": (BLIP_TEXT["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (BLIP_TEXT["max_position_embeddings"], hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for i in range(BLIP_TEXT["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        linears = {"attention.output.dense": (hidden, hidden), "crossattention.output.dense": (hidden, hidden)}
        linears |= {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        linears |= {"crossattention.self.query": (hidden, hidden)}
        linears |= {f"crossattention.self.{part}": (hidden, width) for part in ("key", "value")}
        linears |= {"intermediate.dense": (deep, hidden), "output.dense": (hidden, deep)}
        for name, shape in linears.items():
            text |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        for name in ("attention.output", "crossattention.output", "output"):
            text |= {f"{at}{name}.LayerNorm.weight": (hidden,), f"{at}{name}.LayerNorm.bias": (hidden,)}
    sizes = (hidden, 1024, 128, 64, 16, 1)
    head = {}
    for index, (a, b) in zip(layers, itertools.pairwise(sizes), strict=True):
        head |= {f"{index}.weight": (b, a), f"{index}.bias": (b,)}
    state = {}
    for prefix, table in (("blip.visual_encoder.", shapes), ("blip.text_encoder.", text)):
        zeros = {name: torch.zeros(shape) for name, shape in table.items()}
        state |= {prefix + name: value for name, value in random_state(zeros, prefix).items()}
    # the reference's head is a plain sequence of layers with the dropouts counted
    zeros = {name: torch.zeros(shape) for name, shape in head.items()}
    state |= {"mlp.layers." + name: value for name, value in random_state(zeros, "mlp.layers.").items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(BLIP_TEXT["max_position_embeddings"])[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, width)
    return state


MAKERS = {
    "clip-score": _clip,
    "aesthetic-v2": _aesthetic,
    "hps-v2": _hps,
    "hps-v2.1": _hps,
    "pickscore-v1": _pickscore,
    "imagereward-v1": _imagereward,
    **dict.fromkeys(CYCLES, _cyclereward),
    "mps-v1": _mps,
    "lrm-1.5": partial(_lrm, "lrm-1.5"),
    "lrm-xl": partial(_lrm, "lrm-xl"),
}
