"""Reward models without weights: the architectures that ``rewards.build`` would load, on the meta device."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewards
from rewards import CYCLEREWARD
from rewards.aesthetic import Aesthetic, predictor_head
from rewards.base import Reward
from rewards.clip_encoder import ClipEncoder
from rewards.clip_score import OPENAI, ClipScore
from rewards.cyclereward import CycleReward, cycle_head
from rewards.hps import ARCHITECTURE
from rewards.imagereward import ImageReward
from rewards.lrm import INFO as LRM_INFO
from rewards.lrm import LatentScore
from rewards.mixture import Mixture
from rewards.mps import VIT_H, MpsScore
from rewards.mps_layers import CrossModel
from rewards.pickscore import PickScore
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.estimate.cost import META
from sdo_cli.models.single_file import CONFIGS

# ImageReward-v1.0: BLIP large (ViT-L/16) and med_config.json's BERT
BLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
BLIP_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "encoder_hidden_size": 1024,
}
CLIP_TOKENS = 77
# shipped configs of the models that latent rewards were made from
LRM_MADE_FROM = {"lrm-1.5": "sd15", "lrm-xl": "sdxl"}


def meta_reward(name: str, options: Mapping[str, Any], dtype: torch.dtype) -> Reward:
    """The reward as :func:`rewards.build` makes it, without weights and tokenizer.

    Raises:
        EnvironmentFault: an architecture that cannot be found.
    """
    full = rewards.full_name(name)
    if full == "mixture":
        members = {
            part["name"]: (meta_reward(part["name"], part.get("options") or {}, dtype), 1.0, 0.0, 1.0)
            for part in options["parts"]
        }
        return Mixture(members)
    try:
        reward = _MAKERS[full](options) if full in _MAKERS else rewards.build(full, options)
    except (OSError, RuntimeError, ValueError) as fault:
        raise EnvironmentFault(
            f"the architecture of the reward {name} is not known on this machine: {str(fault).splitlines()[0]}",
            remedy="check the names and paths in its options",
        ) from fault
    if hasattr(reward, "to"):
        reward.to(META, dtype)
    return reward


def _clip(options: Mapping[str, Any]) -> Reward:
    return ClipScore(_encoder(options.get("model") or OPENAI))


def _judge(options: Mapping[str, Any]) -> Reward:
    del options
    return ClipScore(_encoder("embedded:judge"))


def _aesthetic(options: Mapping[str, Any]) -> Reward:
    encoder = _encoder(options.get("model") or OPENAI)
    with META:
        return Aesthetic(encoder, predictor_head(encoder.width))


def _hps(options: Mapping[str, Any]) -> Reward:
    encoder = _encoder(options.get("model") or ARCHITECTURE)
    encoder.preprocess = replace(encoder.preprocess, fit="longest", from_bytes=False)
    return ClipScore(encoder)


def _encoder(model: str) -> ClipEncoder:
    import open_clip

    folder = embedded.folder(model) if embedded.is_embedded(model) else Path(model).expanduser()
    identifier = f"local-dir:{folder}" if folder.is_dir() else model
    with META, _no_warnings():
        net = open_clip.create_model(identifier, load_weights=False, device=META)
    encoder = ClipEncoder.__new__(ClipEncoder)
    encoder._take(net, _zeros(getattr(net, "context_length", CLIP_TOKENS)))
    return encoder


@contextmanager
def _no_warnings() -> Iterator[None]:
    """open_clip warns that no weights are loaded."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _pickscore(options: Mapping[str, Any]) -> Reward:
    from transformers import BatchEncoding, CLIPConfig, CLIPModel

    model = options.get("model")
    # config.json of yuvalkirstain/PickScore_v1 is OpenCLIP's ViT-H/14 as well
    config = CLIPConfig(**VIT_H) if model is None else CLIPConfig.from_pretrained(Path(model).expanduser())

    def tokens(prompts: list[str], *, max_length: int, **settings: Any) -> Any:
        return BatchEncoding({"input_ids": _zeros(max_length)(prompts)})

    with META:
        return PickScore(CLIPModel(config), tokens)


def _mps(options: Mapping[str, Any]) -> Reward:
    from transformers import BatchEncoding, CLIPConfig, CLIPModel

    config = options.get("config")
    settings = VIT_H if config is None else json.loads(Path(config).expanduser().read_text())

    def tokens(prompts: list[str], *, max_length: int, **settings: Any) -> Any:
        return BatchEncoding({"input_ids": _zeros(max_length)(prompts)})

    with META:
        net = CLIPModel(CLIPConfig.from_dict(settings))
        width = net.config.projection_dim
        return MpsScore(net, CrossModel(width, layers=4, heads=16, wider=4 * width), tokens)


def _imagereward(options: Mapping[str, Any]) -> Reward:
    return ImageReward(*_blip(options, predictor_head))


def _cyclereward(options: Mapping[str, Any]) -> Reward:
    return CycleReward(*_blip(options, cycle_head))


def _blip(options: Mapping[str, Any], head: Callable[[int], nn.Module]) -> tuple[Any, Any, nn.Module, Any]:
    from transformers import BatchEncoding, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    def tokens(prompts: list[str], *, max_length: int, **settings: Any) -> Any:
        ids = _zeros(max_length)(prompts)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    config = options.get("config")
    text = BLIP_TEXT if config is None else json.loads(Path(config).expanduser().read_text())
    known = {k: v for k, v in text.items() if k in BLIP_TEXT} | {"encoder_hidden_size": BLIP_VISION["hidden_size"]}
    with META:
        read = BlipTextModel(BlipTextConfig(**known), add_pooling_layer=False)
        return BlipVisionModel(BlipVisionConfig(**BLIP_VISION)), read, head(read.config.hidden_size), tokens


def _lrm(version: str, options: Mapping[str, Any]) -> Reward:
    """By the folder's configs; one that is not here is taken to be built like the model that it was made from."""
    from diffusers import UNet2DConditionModel
    from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    given = Path(str(options.get("model", ""))).expanduser()
    folder = given if (given / "unet" / "config.json").is_file() else CONFIGS / LRM_MADE_FROM[version]
    names = ["text_encoder"] if version == "lrm-1.5" else ["text_encoder", "text_encoder_2"]

    def tokens(prompts: list[str], *, max_length: int, **settings: Any) -> Any:
        return BatchEncoding({"input_ids": _zeros(max_length)(prompts)})

    with META:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = [kinds[name](CLIPTextConfig.from_pretrained(folder / name)) for name in names]
        width = encoders[-1].config.hidden_size
        channels = unet.config.block_out_channels
        features = nn.Linear(sum(channels) + channels[-1], width, bias=False)
        words = nn.Linear(width, width, bias=False) if len(names) == 1 else None
    info = replace(LRM_INFO, name=version)
    scale = torch.zeros((), device=META)
    return LatentScore(unet, encoders, [tokens] * len(names), features, words, scale, info=info)


def _zeros(length: int) -> Any:
    """Prompts to ids ``[B, length]``."""
    return lambda prompts: torch.zeros(len(prompts), length, dtype=torch.long)


_MAKERS = {
    "clip-score": _clip,
    "aesthetic-v2": _aesthetic,
    "judge": _judge,
    "clip-embedded": lambda options: _clip({"model": "embedded"}),
    "aesthetic-embedded": lambda options: _aesthetic({"model": "embedded"}),
    "hps-v2": _hps,
    "hps-v2.1": _hps,
    "pickscore-v1": _pickscore,
    "imagereward-v1": _imagereward,
    **dict.fromkeys(CYCLEREWARD, _cyclereward),
    "mps-v1": _mps,
    "lrm-1.5": lambda options: _lrm("lrm-1.5", options),
    "lrm-xl": lambda options: _lrm("lrm-xl", options),
}
