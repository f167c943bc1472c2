"""PickScore: a CLIP ViT-H/14 fine-tuned on people's choices, run as its authors do, through transformers' CLIPModel."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import PICKSCORE
from rewards.base import RewardInfo, scoring_dtype
from rewards.checkpoints import UNREADABLE, reason
from rewards.kept_prompts import KeptPrompts
from rewards.preprocess import Preprocess
from rewards.reading import unread
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="pickscore-v1",
    summary="human preference: temperature times cosine of image and prompt, CLIP ViT-H/14 trained on Pick-a-Pic",
    source="Kirstain et al. 2023, arXiv 2305.01569; github.com/yuvalkirstain/PickScore",
    licence="MIT",
    range=(15.0, 30.0),
)
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77


class PickScore:
    """``exp(t) · cos(image embedding, prompt embedding)``.

    Args:
        net: a ``transformers.CLIPModel``.
        tokenizer: transformers', as :func:`clip_words` makes it.
    """

    info = INFO

    def __init__(self, net: Any, tokenizer: Any) -> None:
        self.net, self.tokenizer = net.eval().requires_grad_(False), tokenizer
        # rounded to half precision, a temperature of 100 would be 98.9
        self.log_scale = net.logit_scale.detach().clone()
        self.preprocess = Preprocess(net.config.vision_config.image_size, floors_crop=True)
        self._texts = KeptPrompts()

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "PickScore":
        self.net.to(device=device, dtype=dtype)
        self.log_scale = self.log_scale.to(device)
        self._texts.clear()
        return self

    def gradient_checkpointing(self) -> None:
        # transformers recomputes only in training mode, which changes nothing else here: there is no dropout
        self.net.vision_model.train()
        self.net.gradient_checkpointing_enable({"use_reentrant": False})

    def images(self, images: Tensor) -> Tensor:
        """Unit-length embeddings ``[B, D]``."""
        pooled = self.net.vision_model(pixel_values=self.preprocess(images).to(self.net.dtype)).pooler_output
        return self._unit(self.net.visual_projection(pooled))

    def _unit(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.to(scoring_dtype(self.net.dtype)), dim=-1)

    def prompts(self, prompts: list[str]) -> Tensor:
        """Unit-length embeddings ``[B, D]``, each made alone and kept; no gradient."""
        return self._texts.rows(prompts, self._read)

    def _read(self, prompt: str) -> Tensor:
        ids = ids_of(self.tokenizer, [prompt]).to(self.net.device)
        return self._unit(self.net.text_projection(self.net.text_model(input_ids=ids).pooler_output))

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        return unread(self.tokenizer, prompts, self.net.config.text_config.max_position_embeddings)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.log_scale.exp() * (self.images(images) * self.prompts(prompts)).sum(-1)


def clip_words() -> Any:
    """The tokenizer of the authors' processor, that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K: transformers' fast
    CLIPTokenizer.

    open_clip's has the same words and reads otherwise: it mends text (typographic quotes, HTML entities, ligatures,
    broken UTF-8) before it looks. Its table of words is part of the package, so nothing has to be fetched.
    """
    import open_clip
    from transformers import CLIPTokenizerFast

    table = open_clip.SimpleTokenizer()
    words = [*list(table.encoder)[:-2], START, END]
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
        merges = (" ".join(pair) for pair in table.bpe_ranks)
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        return CLIPTokenizerFast.from_pretrained(folder, **marks)


def ids_of(tokenizer: Any, prompts: list[str]) -> Tensor:
    """``[B, L]``, as the authors' processor makes them."""
    read: Tensor = tokenizer(prompts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    return read


def _published() -> Path:
    """The folder in the cache that holds all files."""
    return [find_file(file) for file in PICKSCORE][-1].parent


def build(model: str | None = None) -> PickScore:
    """The published model, unless told otherwise.

    Args:
        model: folder of a ``CLIPModel``.

    Raises:
        EnvironmentFault: it is not there.
    """
    from transformers import CLIPModel

    folder = Path(model).expanduser() if model is not None else _published()
    if not (folder / "config.json").is_file():
        raise EnvironmentFault(
            f"no CLIPModel at {folder}", remedy="give the folder with config.json and model.safetensors"
        )
    try:
        net, found = CLIPModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except UNREADABLE as fault:
        raise EnvironmentFault(
            f"cannot load PickScore from {folder}: {reason(fault)}", remedy="check the folder"
        ) from fault
    # transformers would go on with random numbers
    if missing := sorted(found["missing_keys"]):
        raise EnvironmentFault(
            f"the weights in {folder} lack {len(missing)} of CLIPModel's, for example {missing[0]}",
            remedy="give the folder of a whole CLIPModel",
        )
    return PickScore(net, clip_words())
