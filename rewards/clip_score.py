"""CLIP similarity of an image and its prompt, with any open_clip model."""

import torch
from torch import Tensor

from rewards import OPENAI_CLIP
from rewards.base import RewardInfo
from rewards.clip_encoder import ClipEncoder
from rewards.reading import unread
from sdo_cli.errors import RecipeFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="clip-score",
    summary="cosine similarity of image and prompt under an open_clip model",
    source="Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021, arXiv 2104.08718 (unclipped, unscaled)",
    licence="of the open_clip model used; OpenAI's: MIT; embedded: Apache-2.0",
    range=(-1.0, 1.0),
)
# OpenAI's weights were trained with QuickGELU
OPENAI = "ViT-L-14-quickgelu"


class ClipScore:
    """``cos(image embedding, prompt embedding)``."""

    def __init__(self, encoder: ClipEncoder, info: RewardInfo = INFO) -> None:
        self.encoder, self.info = encoder, info

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "ClipScore":
        self.encoder.to(device, dtype)
        return self

    def gradient_checkpointing(self) -> None:
        self.encoder.gradient_checkpointing()

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        return unread(self.encoder.tokenize, prompts)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.encoder.images(images) * self.encoder.prompts(prompts)).sum(-1)


def openai_clip(model: str | None, pretrained: str | None, tag: str | None = None) -> ClipEncoder:
    """The encoder asked for, or OpenAI's ViT-L/14, as published for open_clip.

    Raises:
        RecipeFault: the embedded judge, whatever the reward: training on it would spoil what measures the gain.
    """
    if model == "embedded:judge":
        raise RecipeFault(["the embedded judge only measures: name the reward `judge`"], what="reward's options")
    if model is None:
        model, pretrained = OPENAI, pretrained or str(find_file(OPENAI_CLIP))
    return ClipEncoder(model, pretrained, tag)


def build(model: str | None = None, pretrained: str | None = None, tag: str | None = None) -> ClipScore:
    """OpenAI's ViT-L/14, unless told otherwise.

    Args:
        model: ``embedded``, a folder with ``open_clip_config.json``, ``hf-hub:owner/name``, or an architecture's
            name in open_clip.
        pretrained: open_clip's tag or the weight file, where ``model`` is an architecture's name.
        tag: which of open_clip's tags a weight file was published as, or trained like; ``default`` for open_clip's own
            preprocessing and activation. Needed only where neither the file's place nor a config beside it tells.
    """
    return ClipScore(openai_clip(model, pretrained, tag))
