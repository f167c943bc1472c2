"""PickScore: a CLIP ViT-H/14 fine-tuned on people's choices, run as its authors do, through transformers' CLIPModel."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import PICKSCORE
from rewards.base import RewardInfo, scoring_dtype
from rewards.checkpoints import UNREADABLE, reason
from rewards.kept_prompts import KeptPrompts
from rewards.preprocess import Preprocess
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="pickscore-v1",
    summary="human preference: temperature times cosine of image and prompt, CLIP ViT-H/14 trained on Pick-a-Pic",
    source="Kirstain et al. 2023, arXiv 2305.01569; github.com/yuvalkirstain/PickScore",
    licence="MIT",
    range=(15.0, 30.0),
)


class PickScore:
    """``exp(t) · cos(image embedding, prompt embedding)``.

    Args:
        net: a ``transformers.CLIPModel``.
        tokenize: prompts to ids ``[B, L]``.
    """

    info = INFO

    def __init__(self, net: Any, tokenize: Any) -> None:
        self.net, self.tokenize = net.eval().requires_grad_(False), tokenize
        # rounded to half precision, a temperature of 100 would be 98.9
        self.log_scale = net.logit_scale.detach().clone()
        self.preprocess = Preprocess(net.config.vision_config.image_size)
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
        ids = self.tokenize([prompt]).to(self.net.device)
        return self._unit(self.net.text_projection(self.net.text_model(input_ids=ids).pooler_output))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.log_scale.exp() * (self.images(images) * self.prompts(prompts)).sum(-1)


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
    import open_clip
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
    # the authors' processor pads with a word where open_clip pads with zeros: CLIP looks at the end mark only
    return PickScore(net, open_clip.get_tokenizer("ViT-H-14"))
