"""Hasler-Süsstrunk colourfulness: opponent-colour statistics of one image (SPIE 5007, 2003, eq. M3)."""

import torch
from torch import Tensor

from rewards.base import RewardInfo

INFO = RewardInfo(
    name="colorfulness",
    summary="Hasler-Süsstrunk colourfulness of the pixels",
    source="Hasler & Süsstrunk, Measuring colourfulness in natural images, SPIE 5007 (2003)",
    licence="none needed",
    range=(0.0, 1.0),
)


def colorfulness(images: Tensor) -> Tensor:
    """``sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²)`` of images ``[B, 3, H, W]`` in [0, 1]; returns ``[B]``.

    The paper's figures are for 8-bit images: multiply by 255 to compare.
    """
    red, green, blue = images.unbind(1)
    rg = (red - green).flatten(1)
    yb = (0.5 * (red + green) - blue).flatten(1)
    tiny = 1e-12  # keeps the square roots differentiable on a grey image
    spread = (rg.var(1, unbiased=False) + yb.var(1, unbiased=False) + tiny).sqrt()
    mean = (rg.mean(1).square() + yb.mean(1).square() + tiny).sqrt()
    return spread + 0.3 * mean


class Colorfulness:
    info = INFO

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        return colorfulness(images.to(torch.float32) if images.dtype == torch.float16 else images)


def build() -> Colorfulness:
    return Colorfulness()
