"""CycleReward: ImageReward's BLIP and another head, trained on what survives a round trip of pictures and captions."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from rewards import BLIP_TEXT_FILES, CYCLEREWARD
from rewards.base import RewardInfo
from rewards.blip import BlipScore, read_parts

INFO = RewardInfo(
    name="cyclereward-combo",
    summary="alignment: how well the picture leads back to the prompt and the prompt to the picture; no people asked",
    source="Bahng et al. 2025, arXiv 2506.02095; github.com/hjbahng/cyclereward (package cyclereward 0.1.7)",
    licence="MIT",
    # its authors state none, and scores are not standardised
    range=(float("-inf"), float("inf")),
)


class CycleReward(BlipScore):
    """``MLP(text state at [CLS], having looked at the image)``."""

    tokens = 128

    def __init__(self, *parts: Any, info: RewardInfo = INFO) -> None:
        super().__init__(*parts)
        self.info = info


def cycle_head(width: int) -> nn.Sequential:
    """``width``-1024-128-64-16-1 with GELUs between; no dropout, so layers are numbered 0, 2, 4, 6, 8."""
    layers: list[nn.Module] = []
    for a, b in pairwise((width, 1024, 128, 64, 16, 1)):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def build(
    version: str = "cyclereward-combo",
    checkpoint: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
) -> CycleReward:
    """The model trained on both directions (``-combo``), on pictures of a text (``-t2i``) or captions (``-i2t``).

    Args:
        checkpoint: ``model.safetensors`` of the authors' repository on the hub, or ``CycleReward-Combo.pth`` of their
            release; fetched from the hub when not given.
        config: ``med_config.json`` of the text encoder; the vision tower's size is read off the checkpoint.
        tokenizer: folder with the ``vocab.txt`` of ``bert-base-uncased``, or that file.

    Raises:
        EnvironmentFault: files that are not there or do not fit together.
    """
    files = (CYCLEREWARD[version], *BLIP_TEXT_FILES)
    parts = read_parts("CycleReward", files, (checkpoint, config, tokenizer), cycle_head)
    return CycleReward(*parts, info=replace(INFO, name=version))
