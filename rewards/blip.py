"""BLIP with a head (ViT-L/16, BERT with cross attention, an MLP) on transformers' modules, from its authors' files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewards.base import RewardInfo, scoring_dtype
from rewards.checkpoints import read_state, reason
from rewards.preprocess import Preprocess
from rewards.reading import unread
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import WeightFile, find_file

# the published file's names of vision layers -> transformers'
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class BlipScore:
    """``head(text state at [CLS], having looked at the image)``."""

    info: RewardInfo
    # read of a prompt
    tokens: ClassVar[int]

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any) -> None:
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        for part in (vision, text, head):
            part.eval().requires_grad_(False)
        self.preprocess = Preprocess(vision.config.image_size)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "BlipScore":
        for part in (self.vision, self.text):
            part.to(device=device, dtype=dtype)
        self.head.to(device=device, dtype=scoring_dtype(dtype))
        return self

    def gradient_checkpointing(self) -> None:
        # transformers recomputes only in training mode; the vision tower has no dropout to wake
        self.vision.train()
        self.vision.gradient_checkpointing_enable({"use_reentrant": False})

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        return unread(self.tokenizer, prompts, self.tokens)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(images.device)
        seen = self.vision(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]
        return self.head(read.to(scoring_dtype(read.dtype))).squeeze(-1)


def read_parts(
    what: str,
    files: tuple[WeightFile, ...],
    given: tuple[str | None, str | None, str | None],
    head: Callable[[int], nn.Module],
) -> tuple[Any, Any, nn.Module, Any]:
    """Vision tower, text encoder, head and tokenizer.

    Args:
        what: the reward in words, for sentences about its files.
        files: as published: checkpoint, ``med_config.json``, vocabulary.
        given: files that replace them.
        head: of the width of the text encoder.

    Raises:
        EnvironmentFault: files that are not there or do not fit together.
    """
    paths = [
        find_file(file) if path is None else Path(path).expanduser() for file, path in zip(files, given, strict=True)
    ]
    for path in paths:
        if not path.exists():
            raise EnvironmentFault(f"no {what} file at {path}", remedy="check the option, or leave it out")
    state, med, words = read_state(paths[0], f"{what} checkpoint"), _config(paths[1]), _words(paths[2])
    try:
        vision, text, layers = _parts(state, med, head)
    # the first name that is looked for is not there, a tensor has another shape, or a setting is of another kind
    except (KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise EnvironmentFault(
            f"the {what} checkpoint {paths[0].name} does not fit {paths[1].name}",
            remedy=f"use {Path(files[0].filename).name} and med_config.json as published together",
        ) from fault
    if len(words) > text.config.vocab_size:
        raise EnvironmentFault(
            f"the vocabulary in {paths[2]} has {len(words)} words, {what}'s text encoder {text.config.vocab_size}",
            remedy="give that of bert-base-uncased",
        )
    return vision, text, layers, words


def _config(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise EnvironmentFault(f"cannot read {path}: {reason(fault)}", remedy="give med_config.json") from fault
    if not isinstance(read, dict):
        raise EnvironmentFault(f"{path} is no table of settings", remedy="give med_config.json")
    return read


def _words(path: Path) -> Any:
    """BERT's tokenizer; without this look, transformers makes one that knows no word at all."""
    from transformers import BertTokenizer

    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise EnvironmentFault(f"no vocab.txt in {folder}", remedy="give the folder of bert-base-uncased's tokenizer")
    return BertTokenizer.from_pretrained(folder)


def _parts(
    state: dict[str, Tensor], med: dict[str, Any], make_head: Callable[[int], nn.Module]
) -> tuple[Any, Any, nn.Module]:
    """Vision tower, text encoder and head with the weights of a published state."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seen, read, scored = (_under(state, prefix) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."))
    vision = BlipVisionModel(BlipVisionConfig(**_vision_config(seen), layer_norm_eps=1e-6))
    vision.load_state_dict({_vision_name(name): value for name, value in seen.items()})
    width = vision.config.hidden_size
    names = set(BlipTextConfig().to_dict()) - {"architectures", "model_type", "encoder_hidden_size"}
    text_config = BlipTextConfig(**{k: v for k, v in med.items() if k in names}, encoder_hidden_size=width)
    text = BlipTextModel(text_config, add_pooling_layer=False)
    # position_ids is a table of 0, 1, 2 … that older libraries saved
    text.load_state_dict({k: v for k, v in read.items() if k != "embeddings.position_ids"})
    head = make_head(text_config.hidden_size)
    head.load_state_dict({name.removeprefix("layers."): value for name, value in scored.items()})
    return vision, text, head


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _vision_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes of the ViT; the head width of 64 is that of every published BLIP."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "hidden_size": width,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_attention_heads": max(1, width // 64),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _vision_name(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name
