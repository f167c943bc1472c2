"""Differentiable preprocessing in the form image encoders expect."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """Shortest side to ``size`` (antialiased), centre crop, channel normalisation: CLIP's evaluation transform."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to ``[B, 3, size, size]``, normalised; gradients flow."""
        height, width = images.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            # torchvision's Resize truncates the longer side
            target = (
                self.size if height <= width else int(height * scale),
                self.size if width <= height else int(width * scale),
            )
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
            # PIL rounds to bytes and so clips the overshoot of a bicubic kernel
            images = images.clamp(0, 1)
        top = round((images.shape[-2] - self.size) / 2)
        left = round((images.shape[-1] - self.size) / 2)
        images = images[..., top : top + self.size, left : left + self.size]
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        return (images - mean) / std
