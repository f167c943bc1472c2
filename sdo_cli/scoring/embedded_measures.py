"""Measures on embeddings of images by clip-score's model: unit-length rows, all in float64."""

import torch
from torch import Tensor


def diversity(rows: Tensor) -> float:
    """Mean of 1 - cos over all pairs of ``rows [n, D]``, n > 1."""
    count, some = len(rows), rows.double()
    similar = some @ some.T
    others = (similar.sum() - similar.diagonal().sum()) / (count * (count - 1))
    return float(1 - others.item())


def diversities(rows: Tensor) -> Tensor:
    """``[prompts, seeds, D]`` to ``[prompts]``."""
    return torch.tensor([diversity(some) for some in rows], dtype=torch.float64)


def distances(rows: Tensor, base: Tensor) -> Tensor:
    """1 - cos of each row to the one it is held against, ``[…, D]`` to ``[…]``."""
    return 1 - (rows.double() * base.double()).sum(-1)
