"""ImageReward: BLIP and the aesthetic predictor's head, on people's rankings."""

from torch import Tensor

from rewards import IMAGEREWARD
from rewards.aesthetic import predictor_head
from rewards.base import RewardInfo
from rewards.blip import BlipScore, read_parts

INFO = RewardInfo(
    name="imagereward-v1",
    summary="human preference: BLIP reads image and prompt together; standardised, so about a normal variable",
    source="Xu et al. 2023, arXiv 2304.05977; github.com/THUDM/ImageReward (ImageReward-v1.0)",
    licence="Apache-2.0",
    range=(-2.5, 2.0),
)
# of the authors' scores over their data, part of their model
MEAN, STD = 0.16717362830052426, 1.0333394966054072


class ImageReward(BlipScore):
    """``(MLP(text state at [CLS], having looked at the image) - mean) / std``."""

    info = INFO
    tokens = 35

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (super().score(images, prompts) - MEAN) / STD


def build(checkpoint: str | None = None, config: str | None = None, tokenizer: str | None = None) -> ImageReward:
    """The published model.

    Args:
        checkpoint: ``ImageReward.pt``, fetched from the hub when not given.
        config: ``med_config.json`` of the text encoder; the vision tower's size is read off the checkpoint.
        tokenizer: folder with the ``vocab.txt`` of ``bert-base-uncased``, or that file.

    Raises:
        EnvironmentFault: files that are not there or do not fit together.
    """
    return ImageReward(*read_parts("ImageReward", IMAGEREWARD, (checkpoint, config, tokenizer), predictor_head))
