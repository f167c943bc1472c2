"""Differentiable preprocessing in the form image encoders expect."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# of PIL's fixed-point weights
PRECISION_BITS = 22
# half the width of a kernel, in pixels of the smaller image
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """PIL's filters; its bicubic one is Keys' with a = -0.5."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@lru_cache(maxsize=64)
def resize_matrix(old: int, new: int, interpolation: str) -> Tensor:
    """``[new, old]`` in float64: PIL's resampling of one axis, its weights rounded to 22 bits as PIL rounds them.

    With it, and rounding to bytes after each axis, the values are PIL's to the last bit
    (``Image.resize`` of 8-bit images, src/libImaging/Resample.c).
    """
    scale = old / new
    stretch = max(scale, 1.0)
    reach = SUPPORT[interpolation] * stretch
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(old, dtype=torch.float64)[None]
    first = (centre - reach + 0.5).floor().clamp(min=0)
    last = (centre + reach + 0.5).floor().clamp(max=old)
    weights = _kernel((pixel - centre + 0.5) / stretch, interpolation) * ((pixel >= first) & (pixel < last))
    weights = weights / weights.sum(1, keepdim=True) * 2**PRECISION_BITS
    return (weights + 0.5 * weights.sign()).trunc() / 2**PRECISION_BITS


def rounded_to_bytes(images: Tensor) -> Tensor:
    """The nearest of 256 levels, halves up; the gradient is that of the unrounded value (straight through)."""
    exact = images.detach()
    return images + ((exact * 255 + 0.5 + 1e-9).floor() / 255 - exact)


def snapped_to_bytes(images: Tensor) -> Tensor:
    """Values that are a byte but for float32's rounding, made that byte: else halves would not be seen as halves."""
    exact = images.detach() * 255
    near = exact.round()
    return images + torch.where((exact - near).abs() < 1e-4, near - exact, 0.0) / 255


@dataclass(frozen=True)
class Preprocess:
    """Resize (antialiased), crop or pad to a square, normalise the channels.

    Attributes:
        size: of the square, in pixels.
        fit: ``shortest`` side to ``size`` and centre crop (CLIP's evaluation transform), ``longest`` side to
            ``size`` and black borders (HPS), or ``squash`` both sides to ``size`` (SigLIP).
        from_bytes: the reference resizes an 8-bit PIL image: width first, then height, each clipped and rounded to
            bytes. The values here are the same; gradients pass the rounding as if it were not there. HPS resizes
            floats, and rounds the ``longest`` fit in its own way. (From Pillow 13 on, height comes first where it
            shrinks much more than width, which only ``squash`` does: there a value may be one byte off.)
        floors_crop: an odd margin is cut as transformers does, the smaller part first; torchvision, which open_clip
            and ImageReward use, rounds half to even: one pixel apart for 832 x 1216.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: str = "bicubic"
    fit: str = "shortest"
    from_bytes: bool = True
    floors_crop: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to ``[B, 3, size, size]``, normalised; gradients flow."""
        target = self.target(*images.shape[-2:])
        if target != images.shape[-2:]:
            images = self._resized(images, target)
        images = self._squared(images)
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        return (images - mean) / std

    def _resized(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        if not self.from_bytes:
            return F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
        exact = snapped_to_bytes(images.double())
        for axis, new in ((-1, target[1]), (-2, target[0])):
            if new != exact.shape[axis]:
                matrix = resize_matrix(exact.shape[axis], new, self.interpolation).to(images.device)
                exact = exact @ matrix.T if axis == -1 else matrix @ exact
                exact = rounded_to_bytes(exact.clamp(0, 1))
        return exact.to(images.dtype)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the references truncate or round the other side."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "longest":
            # in open_clip's and in HPS's order of dividing: 175 x 400 to 56 is 24 with one, 25 with the other
            long = max(height, width)
            sides = [
                round(x / (long / self.size) if self.from_bytes else x * (self.size / long)) for x in (height, width)
            ]
            return sides[0], sides[1]
        # multiplied first, as torchvision and transformers do: 55 x 110 to 224 is 448, not 447
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _squared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.fit == "longest":
            down, right = self.size - height, self.size - width
            return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        top, left = (
            over // 2 if self.floors_crop else round(over / 2) for over in (height - self.size, width - self.size)
        )
        return images[..., top : top + self.size, left : left + self.size]
