"""Gradients of several rewards at one picture as one gradient: their sum, or what a published rule makes of a conflict.

R samples, K rewards, D numbers of a picture. Every sample stands on its own, so nothing hangs on the batch or the
number of processes. Gradients are of losses and come weighted.
"""

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from torch import Tensor

# subsets of so many are tried one by one
MOST_REWARDS = 6


def added(g_KRD: Tensor) -> Tensor:
    """The sum ``[R, D]``."""
    return g_KRD.sum(0)


def projected(g_KRD: Tensor) -> Tensor:
    """Yu et al. 2020, Gradient Surgery (PCGrad, arXiv 2001.06782): what of each goes against another is taken off.

    g_i ← g_i - <g_i, g_j> / <g_j, g_j> g_j for every other j with <g_i, g_j> < 0, g_j as it was; then the sum
    ``[R, D]``. The paper goes through j in random order; here it is the recipe's, from i on: the same for two rewards.
    """
    number, squares = len(g_KRD), g_KRD.square().sum(-1, keepdim=True)
    total = torch.zeros_like(g_KRD[0])
    for i in range(number):
        mine = g_KRD[i]
        for j in ((i + step) % number for step in range(1, number)):
            along = (mine * g_KRD[j]).sum(-1, keepdim=True)
            # a reward without a gradient is against nothing
            share = torch.where(along < 0, along / squares[j].clamp(min=torch.finfo(mine.dtype).tiny), 0)
            mine = mine - share * g_KRD[j]
        total = total + mine
    return total


def least(g_KRD: Tensor) -> Tensor:
    """Désidéri 2012; Sener & Koltun 2018 (MGDA, arXiv 1810.04650): the shortest vector between the gradients.

    min ‖Σ α_k g_k‖ over α_k ≥ 0, Σ α_k = 1, times the number of rewards, so that equal gradients give their sum
    ``[R, D]``. To go along it makes no reward worse. A reward without a gradient at a sample is left out there.
    """
    alpha = shares(torch.einsum("krd,lrd->rkl", g_KRD.double(), g_KRD.double()))
    number = (alpha.new_tensor(len(g_KRD)) - (g_KRD == 0).all(-1).sum(0)).unsqueeze(-1)
    return (torch.einsum("rk,krd->rd", alpha, g_KRD.double()) * number).to(g_KRD.dtype)


def shares(gram_RKK: Tensor) -> Tensor:
    """α ``[R, K]`` of the shortest vector, exact: among all subsets, the best whose own solution has no negative share.

    Args:
        gram_RKK: products of the gradients, in float64.
    """
    number = gram_RKK.shape[-1]
    diagonal = gram_RKK.diagonal(dim1=-2, dim2=-1)
    best = torch.full(gram_RKK.shape[:1], torch.inf, dtype=gram_RKK.dtype, device=gram_RKK.device)
    found = torch.zeros_like(diagonal)
    for size in range(1, number + 1):
        for chosen in combinations(range(number), size):
            inner = gram_RKK[:, chosen][:, :, chosen]
            # equal gradients have no solution of their own; each of them alone has
            scale = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-300)
            ones = torch.ones_like(inner[..., 0])
            solved = torch.linalg.lstsq(inner / scale, ones.unsqueeze(-1)).solution.squeeze(-1)
            alpha = solved / solved.sum(-1, keepdim=True)
            length = torch.einsum("rk,rkl,rl->r", alpha, inner, alpha)
            fits = (alpha >= 0).all(-1) & (diagonal[:, chosen] > 0).all(-1) & (length < best)
            best = torch.where(fits, length, best)
            whole = torch.zeros_like(found)
            whole[:, chosen] = alpha
            found = torch.where(fits[:, None], whole, found)
    return found


CONFLICTS: dict[str, Callable[[Tensor], Tensor]] = {"none": added, "projection": projected, "mgda": least}


def looked_at(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lengths ``[R]`` of the gradients by name, and cosines of each pair under ``a|b``; 0 where one is zero."""
    flat = {name: g.flatten(1).float() for name, g in gradients.items()}
    lengths = {name: g.norm(dim=1) for name, g in flat.items()}
    found = dict(lengths)
    for a, b in combinations(flat, 2):
        scale = (lengths[a] * lengths[b]).clamp(min=torch.finfo(torch.float32).tiny)
        found[f"{a}|{b}"] = (flat[a] * flat[b]).sum(1) / scale
    return found
