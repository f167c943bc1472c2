"""What rewards see of a picture in training: cut, noisy and compressed copies of it, or one moved against them.

A reward that is fooled by a pattern of pixels likes neither another crop nor a little noise as well; one that likes
what is shown does. All of it lets gradients through, and every draw is keyed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# generator(row, view) -> the CPU generator of this view of a sample
Draw = Callable[[int, int], torch.Generator]
BEST_QUALITY = 95

# ITU-T T.81 (JPEG), annex K
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
# of JFIF: rows Y, Cb, Cr
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Sight:
    """Attributes:
    crop: up to this share of each side is cut off, and the rest made as large again.
    noise: standard deviation of what is added, of pixels in [0, 1].
    jpeg: the lowest quality of a compressed copy, up to 95; 0 for none.
    """

    crop: float = 0.0
    noise: float = 0.0
    jpeg: int = 0

    @property
    def alters(self) -> bool:
        return bool(self.crop or self.noise or self.jpeg)

    def __call__(self, images: Tensor, draw: Draw, rows: list[int], view: int) -> Tensor:
        """A view ``[R, 3, H, W]`` of images in [0, 1], in [0, 1]; ``rows`` name the samples for ``draw``."""
        drawn = [self._drawn(draw(row, view), images.shape[1:]) for row in rows]
        boxes, noises, qualities = zip(*drawn, strict=True)
        if self.crop:
            images = cropped(images, torch.tensor(boxes, dtype=torch.float32))
        if self.noise:
            images = (images + self.noise * torch.stack(noises).to(images)).clamp(0, 1)
        return compressed(images, torch.tensor(qualities, dtype=torch.float32)) if self.jpeg else images

    def _drawn(self, generator: torch.Generator, shape: torch.Size) -> tuple[tuple[float, float, float], Tensor, float]:
        """Always in one order, so that one kind of change does not alter the draws of another."""
        size, left, top, quality = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = 1 - self.crop * size
        noise = torch.randn(shape, generator=generator) if self.noise else torch.zeros(())
        box = (side, left * (1 - side), top * (1 - side))
        return box, noise, self.jpeg + quality * (BEST_QUALITY - self.jpeg)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """A part of each image, made as large as it was, bilinear.

    Args:
        boxes: side, left and top as shares of the image, ``[R, 3]``; (1, 0, 0) is the whole.
    """
    side, left, top = boxes.to(images.device).unbind(1)
    zero = torch.zeros_like(side)
    # from the new image's [-1, 1] into the old one's
    moves = [torch.stack((side, zero, 2 * left + side - 1), 1), torch.stack((zero, side, 2 * top + side - 1), 1)]
    grid = functional.affine_grid(torch.stack(moves, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False).to(images.dtype)


def compressed(images: Tensor, quality: Tensor) -> Tensor:
    """JPEG without subsampling, quality ``[R]`` as libjpeg counts it; gradients pass its rounding unchanged."""
    height, width = images.shape[-2:]
    pad = functional.pad(images.float() * 255, (0, -width % 8, 0, -height % 8), mode="replicate")
    ycc = torch.einsum("ck,rkhw->rchw", pad.new_tensor(TO_YCC), pad)
    # as bytes, before and after
    ycc = _rounded(ycc) - ycc.new_tensor([128.0, 0.0, 0.0]).view(1, 3, 1, 1)
    rows, columns = pad.shape[-2] // 8, pad.shape[-1] // 8
    blocks = ycc.reshape(len(images), 3, rows, 8, columns, 8)
    dct = _dct(pad)
    found = torch.einsum("ui,rcaibj,vj->rcaubv", dct, blocks, dct)
    table = _tables(quality.to(pad), pad).view(len(images), 3, 1, 8, 1, 8)
    kept = _rounded(found / table) * table
    back = torch.einsum("ui,rcaubv,vj->rcaibj", dct, kept, dct).reshape(ycc.shape)
    back = _rounded(back) + back.new_tensor([128.0, 0.0, 0.0]).view(1, 3, 1, 1)
    rgb = torch.einsum("ck,rkhw->rchw", torch.linalg.inv(pad.new_tensor(TO_YCC)), back)
    return (rgb[..., :height, :width] / 255).clamp(0, 1).to(images.dtype)


def _rounded(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


def _dct(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of 8 places ``[frequency, place]``."""
    k = torch.arange(8, dtype=torch.float64)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) / 2
    basis[0] /= 2**0.5
    return basis.to(like)


def _tables(quality: Tensor, like: Tensor) -> Tensor:
    """``[R, 3, 8, 8]``, as libjpeg scales them."""
    base = torch.stack([like.new_tensor(LUMINANCE), like.new_tensor(CHROMINANCE), like.new_tensor(CHROMINANCE)])
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).view(-1, 1, 1, 1)
    return ((base * scale + 50) / 100).floor().clamp(1, 255)
