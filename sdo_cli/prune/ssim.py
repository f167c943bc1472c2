"""Structural similarity, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

# of Wang et al. 2004: an 11 × 11 Gaussian of σ 1.5, and K1, K2 for a data range of 1
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Mean structural similarity ``[B]`` of images ``[B, C, H, W]`` in [0, 1], at most 1 (Wang et al. 2004).

    Windows lie inside the image: its sides must be 11 pixels or more.
    """
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    line = line / line.sum()
    channels = images.shape[1]
    window = (line[:, None] * line[None]).expand(channels, 1, WINDOW, WINDOW)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=channels)

    mu_x, mu_y = mean(images), mean(others)
    var_x, var_y = mean(images * images) - mu_x**2, mean(others * others) - mu_y**2
    cov = mean(images * others) - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + C1) * (2 * cov + C2) / ((mu_x**2 + mu_y**2 + C1) * (var_x + var_y + C2))
    return similarity.flatten(1).mean(1)
