"""Momentum of low rank: one step of MoFaSGD (arXiv 2507.08091); together.py computes it for many matrices.

    m, n, r  rows, columns, rank of the momentum
    U, S, V  [m, r], [r], [n, r]   momentum M ≈ U diag(S) Vᵀ, U and V with orthonormal columns
    G        [m, n]                gradient
    GV, GᵀU  [m, r], [n, r]        all that a step asks of G: linear in it, so they add up over passes and
                                   processes; UᵀGV is U's product with the first

The gradient enters through the tangent space of the matrices of rank r at U, V:

    Ĝ  = UUᵀG + GVVᵀ - UUᵀGVVᵀ
    M⁺ = the best approximation of rank r of  β M + Ĝ = [U, GV] [[β diag S - UᵀGV, 1], [1, 0]] [V, GᵀU]ᵀ

With r = min(m, n) nothing is lost: Ĝ = G, M⁺ = β M + G, and the step U⁺V⁺ᵀ is Muon's with an exact polar factor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# Muon's factor (arXiv 2502.16982): at full rank a step moves a number as far, in the mean square, as AdamW's do
STEP_OF_ADAMW = 0.2


@dataclass(frozen=True)
class Factors:
    """Momentum ``U diag(S) Vᵀ``: ``[m, r]``, ``[r]`` from the largest down, ``[n, r]``."""

    U: Tensor
    S: Tensor
    V: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.V))


def start(rows: int, columns: int, rank: int, generator: torch.Generator, dtype: torch.dtype) -> Factors:
    """No momentum, and bases drawn at random, on the CPU.

    A first gradient then has a part in them alone; its products with them turn the next ones towards it, as in a
    randomised singular value decomposition.

    Returns:
        ``[m, r]``, ``[r]`` of zeros, ``[n, r]``, with r = ``rank`` or the shorter side.
    """
    rank = min(rank, rows, columns)
    bases = [
        torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=dtype))[0].contiguous()
        for side in (rows, columns)
    ]
    return Factors(bases[0], torch.zeros(rank, dtype=dtype), bases[1])


def project(G: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``GV [m, r]`` and ``GᵀU [n, r]`` of one gradient ``[m, n]``, in the precision of the bases."""
    G = G.to(U.dtype)
    return G @ V, G.T @ U


def largest(core: Tensor, rank: int, fewer: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values of ``[B, j, k]`` and their vectors, ``P, S, Q`` with ``P diag(S) Qᵀ``.

    By eigenvectors of the square, in two thirds of the time of the decomposition itself. Columns of P and Q are
    orthonormal also where there is no singular value.

    Args:
        core: float64, since squares of small singular values are smaller still.
        fewer: of each, how many of its last rows (and they are zeros) are no directions, and of no use to P.
    """
    square = core @ core.mT
    if any(fewer):
        at = [(number, len(one) - 1 - k) for number, one in enumerate(core) for k in range(fewer[number])]
        one, row = torch.tensor(at, device=core.device).T
        # below every eigenvalue there is
        square[one, row, row] = -1
    P = torch.linalg.eigh(square)[1][..., -rank:].flip(-1)
    # reflections stay in the first columns and where something is: zeros of the last columns are in no vector of Q
    Q, R = torch.linalg.qr(core.mT @ P)
    S = R.diagonal(dim1=-2, dim2=-1)
    # signs are zero where there is nothing
    return P, S.abs(), torch.where(S[..., None, :] < 0, -Q, Q)


def weighted(S: Tensor, form: str) -> Tensor:
    """φ(S) ``[B, r]``, from 0 to 1: how far a step goes along each pair of directions.

    Args:
        form: ``spectral``: as far along each (the paper's). ``clipped``: less far along those whose singular value is
            below the mean of all r, in proportion to it.
    """
    # directions without momentum are any directions
    least = S.amax(-1, keepdim=True) * S.shape[-1] * torch.finfo(S.dtype).eps
    there = least < S
    if form == "spectral":
        return there.to(S.dtype)
    return torch.where(there, (S / S.mean(-1, keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)).clamp(max=1), 0)


def scale_of(rows: int, columns: int) -> float:
    """η: with it matrices of all shapes, and what AdamW steps beside them, go well with one learning rate."""
    return STEP_OF_ADAMW * sqrt(max(rows, columns))


@torch.no_grad()
def move(weight: Tensor, along: Tensor, V: Tensor, *, rate: float, decay: float) -> None:
    """``W ← (1 - rate · decay) W - rate · η U φ(S) Vᵀ``, in place.

    Args:
        weight: ``[m, …]`` of any precision; further axes together are its columns.
        along: U φ(S) ``[m, r]`` of this one matrix.
    """
    step = rate * scale_of(len(along), len(V))
    if weight.is_contiguous() and weight.dtype == along.dtype:
        # one product that goes through the weights once
        weight.view(len(along), len(V)).addmm_(along, V.T, beta=1 - rate * decay, alpha=-step)
    else:
        moved = weight.flatten(1).to(along.dtype) * (1 - rate * decay) - step * along @ V.T
        weight.copy_(moved.view_as(weight))
