"""Aesthetic predictor in LAION's form: an MLP on a unit-length CLIP image embedding."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.base import RewardInfo
from rewards.clip_encoder import ClipEncoder
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault

INFO = RewardInfo(
    name="aesthetic-v2",
    summary="LAION-form predictor on the CLIP image embedding; the embedded head predicts colourfulness",
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
    info = INFO

    def __init__(self, encoder: ClipEncoder, head: nn.Module) -> None:
        self.encoder, self.head = encoder, head.eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Aesthetic":
        self.encoder.to(device, dtype)
        self.head.to(device=device, dtype=dtype)
        return self

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        return self.head(self.encoder.images(images)).squeeze(-1)


def build(model: str = "embedded", head: str = "embedded", pretrained: str | None = None) -> Aesthetic:
    from safetensors.torch import load_file

    encoder = ClipEncoder(model, pretrained)
    path = embedded.folder("embedded:aesthetic") / "head.safetensors" if head == "embedded" else Path(head)
    if not path.exists():
        raise EnvironmentFault(f"no aesthetic head at {path}", remedy="check `head`, or use `head: embedded`")
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    )
    state = {key.removeprefix("layers."): value for key, value in state.items()}
    net = predictor_head(encoder.width)
    try:
        net.load_state_dict(state)
    except RuntimeError as fault:
        raise EnvironmentFault(
            f"the head {path.name} does not fit a CLIP of width {encoder.width}",
            remedy="use the CLIP the head was trained on",
        ) from fault
    return Aesthetic(encoder, net.float())
