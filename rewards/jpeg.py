"""JPEG compressibility, as in DDPO: how few bytes an image takes. It only measures: JPEG has no gradient."""

import io

import torch
from PIL import Image
from torch import Tensor

from rewards.base import RewardInfo
from sdo_cli.errors import RecipeFault

INFO = RewardInfo(
    name="jpeg-compressibility",
    summary="minus the kilobytes of the image as JPEG of quality 95; higher is smoother",
    source="Black et al. 2023, arXiv 2305.13301 (DDPO)",
    licence="none needed",
    range=(-500.0, 0.0),
    differentiable=False,
    trainable=False,
)


class JpegCompressibility:
    info = INFO

    def __init__(self, quality: int) -> None:
        self.quality = quality

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        arrays = (images.detach().cpu().permute(0, 2, 3, 1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return torch.tensor([-self._kilobytes(Image.fromarray(array)) for array in arrays], device=images.device)

    def _kilobytes(self, image: Image.Image) -> float:
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=self.quality)
        return stream.tell() / 1000


def build(quality: int = 95) -> JpegCompressibility:
    """Args:
    quality: of the JPEG, 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise RecipeFault([f"quality must be between 1 and 100, not {quality}"], what="reward's options")
    return JpegCompressibility(quality)
