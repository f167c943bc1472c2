"""Aesthetic predictor in LAION's form: an MLP on a unit-length CLIP image embedding."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rewards import AESTHETIC_HEAD
from rewards.base import RewardInfo, scoring_dtype
from rewards.checkpoints import read_state
from rewards.clip_encoder import ClipEncoder
from rewards.clip_score import openai_clip
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="aesthetic-v2",
    summary="LAION's aesthetic predictor on a CLIP image embedding",
    source="github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE layout)",
    licence="Apache-2.0",
    range=(0.0, 10.0),
)


def predictor_head(width: int) -> nn.Sequential:
    """The published layout: ``width``-1024-128-64-16-1, dropout between (off in evaluation), no activations."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class Aesthetic:
    def __init__(self, encoder: ClipEncoder, head: nn.Module) -> None:
        self.info = INFO
        self.encoder, self.head = encoder, head.eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Aesthetic":
        self.encoder.to(device, dtype)
        self.head.to(device=device, dtype=scoring_dtype(dtype))
        return self

    def gradient_checkpointing(self) -> None:
        self.encoder.gradient_checkpointing()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        return self.head(self.encoder.images(images)).squeeze(-1)


def build(
    model: str | None = None, head: str | None = None, pretrained: str | None = None, tag: str | None = None
) -> Aesthetic:
    """The published head on OpenAI's ViT-L/14, unless told otherwise.

    Args:
        model: which CLIP: ``embedded``, a folder with ``open_clip_config.json``, ``hf-hub:owner/name``, or the
            name of an architecture in open_clip.
        head: file of the predictor on top of it, or ``embedded``; it has to be made for that CLIP.
        pretrained: open_clip's tag or the weight file, where ``model`` is an architecture's name.
        tag: which of open_clip's tags a weight file was published as, or trained like; ``default`` for open_clip's own
            preprocessing and activation. Needed only where neither the file's place nor a config beside it tells.

    Raises:
        EnvironmentFault: weights that are not there, or a head made for another CLIP.
    """
    path = _head_path(head)
    encoder = openai_clip(model, pretrained, tag)
    net = predictor_head(encoder.width)
    try:
        net.load_state_dict(_layers(path))
    except RuntimeError as fault:
        raise EnvironmentFault(
            f"the head {path.name} does not fit a CLIP of width {encoder.width}",
            remedy="use the CLIP the head was trained on",
        ) from fault
    return Aesthetic(encoder, net.float())


def _head_path(head: str | None) -> Path:
    if head is None:
        return find_file(AESTHETIC_HEAD)
    return embedded.folder("embedded:aesthetic") / "head.safetensors" if head == "embedded" else Path(head).expanduser()


def _layers(path: Path) -> dict[str, Tensor]:
    """The head's weights; the published file names its layers ``layers.N``."""
    return {key.removeprefix("layers."): value for key, value in read_state(path, "aesthetic head").items()}
