"""One step of many momenta of low rank, computed together (the mathematics: low_rank.py).

Small matrices cost more in calls than in arithmetic. A matrix has two sides, U with GV and V with GᵀU, and to find what
a product adds to its basis asks of a side only how many rows it has. So sides of about one height are one stack, filled
up with rows of zeros, which stay zeros; and what lies between the bases, 2r by 2r, is one stack of all matrices.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdo_cli.optimizers.low_rank import largest, weighted

# numbers in a stack of bases
MOST = 2**20
# of its tallest side, what the others of a stack have at least
NEAR = 0.6
# how far from 1 columns may be that were made orthonormal once; further off, directions have been lost
WELL = 0.1


class Together:
    """Momenta of one rank, of matrices of any shapes.

    Args:
        sides: ``base [m, r], product [m, r]`` of each: U and GV of the first matrix, V and GᵀU of it, U and GV of the
            second, and so on.
    """

    def __init__(self, sides: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.bases = [base for base, _ in sides]
        count, rank = len(sides), self.bases[0].shape[1]
        # of every side, ``[2B, r, r]``: baseᵀ product, and moreᵀ product with its new directions
        self.inner, self.corner = (self.bases[0].new_empty(count, rank, rank) for _ in range(2))
        # a side of fewer than 2r rows has fewer new directions than its product has columns
        self.fewer = [max(0, 2 * rank - len(base)) for base in self.bases]
        self.squares = torch.stack(torch._foreach_norm([product for _, product in sides])).square().sum()
        self.stacks = [self._stack(members, sides) for members in _of_one_height(self.bases)]

    def _stack(self, members: list[int], sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
        few = [self.bases[member] for member in members]
        base = pad_sequence(few, batch_first=True)
        product = pad_sequence([sides[member][1] for member in members], batch_first=True)
        more, inner, corner = beyond(base, product, len(few[0]))
        at = torch.tensor(members, device=base.device)
        self.inner[at], self.corner[at] = inner, corner
        return at, few, more

    def norm_squared(self) -> Tensor:
        """Of all matrices together, |Ĝ|²: Ĝ's parts are at right angles."""
        return (self.squares - self.inner[::2].square().sum()).clamp(min=0)

    def step(self, S: Tensor, beta: float, share: float, form: str) -> tuple[Tensor, list[Tensor]]:
        """The bases become those of ``M⁺ = β M + share Ĝ``, in place.

        Args:
            S: ``[B, r]`` of M.

        Returns:
            ``S [B, r]`` of M⁺, and of every side what a weight moves along: U φ(S) of the first matrix, its V, …
        """
        rank = S.shape[1]
        core = S.new_zeros(len(S), 2 * rank, 2 * rank, dtype=torch.float64)
        core[:, :rank, :rank] = self.inner[::2]
        core[:, rank:, :rank] = self.corner[::2]
        core[:, :rank, rank:] = self.corner[1::2].mT
        core *= share
        core[:, :rank, :rank].diagonal(dim1=1, dim2=2).add_(beta * S)
        P, found, Q = largest(core, rank, self.fewer[::2])
        found = found.to(S.dtype)
        turns = torch.stack([P, Q], 1).flatten(0, 1).to(S.dtype)
        far = torch.stack([weighted(found, form), torch.ones_like(found)], 1).flatten(0, 1).unsqueeze(1)
        along: list[Tensor] = [S] * len(self.bases)
        while self.stacks:
            # each is freed as soon as it is used
            at, few, more = self.stacks.pop()
            old, fresh = turns[at].split(rank, 1)
            new = torch.baddbmm(pad_sequence(few, batch_first=True) @ old, more, fresh)
            torch._foreach_copy_(few, _cut(new, few))
            for member, mine in zip(at.tolist(), _cut(new.mul_(far[at]), few), strict=True):
                along[member] = mine
        return found, along


def beyond(base: Tensor, product: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns at right angles to ``base`` that span with it what ``product`` does, of a stack of sides.

    By Cholesky factors of Gram matrices, twice (CholeskyQR2, arXiv 1401.6140), which are products of matrices; where
    columns of ``product`` say little new those fail, and the sides that have such get Householder's reflections.

    Args:
        base, product: ``[B, h, r]``, rows of zeros at the end of some.
        rows: of any of them without those zeros, if it is less than 2r; a stack of those has none.

    Returns:
        ``more [B, h, r]``, ``baseᵀ product [B, r, r]``, ``moreᵀ product [B, r, r]``. With less than 2r rows the last
        columns of ``more`` are zeros.
    """
    rank = base.shape[-1]
    inner = base.mT @ product
    if rows < 2 * rank:
        more = torch.zeros_like(product)
        more[..., : rows - rank] = torch.linalg.qr(torch.cat([base, product], -1))[0][..., rank:rows]
        return more, inner, more.mT @ product
    more, left = _take_off(base, product, inner)
    more, again = _take_off(base, more, base.mT @ more)
    corner = again @ left
    # what is not a number is not well either
    ill = ~((again.diagonal(dim1=1, dim2=2) - 1).abs().amax(-1) < WELL)
    if ill.any():
        more[ill] = _reflected(base[ill], product[ill])
        corner[ill] = more[ill].mT @ product[ill]
    return more, inner, corner


def _take_off(base: Tensor, product: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """``product`` less its part in ``base``, its columns made orthonormal; and the triangle that undoes the latter."""
    rest = torch.baddbmm(product, base, inner, alpha=-1)
    triangle, failed = torch.linalg.cholesky_ex(rest.mT @ rest, upper=True)
    triangle.diagonal(dim1=1, dim2=2)[failed != 0] = torch.nan
    return torch.linalg.solve_triangular(triangle, rest, upper=True, left=False), triangle


def _reflected(base: Tensor, product: Tensor) -> Tensor:
    for _ in range(2):
        # the second time takes off what rounding, or a product that lies in the base, has left of it
        product = torch.linalg.qr(torch.baddbmm(product, base, base.mT @ product, alpha=-1))[0]
    return product


def _of_one_height(bases: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of sides that become one stack, the tallest first."""
    order = sorted(range(len(bases)), key=lambda number: -len(bases[number]))
    stack: list[int] = []
    for number in order:
        rows, rank = bases[number].shape
        if stack:
            tallest = len(bases[stack[0]])
            near = rows == tallest if rows < 2 * rank else rows >= NEAR * tallest
            if not near or (len(stack) + 1) * tallest * rank > MOST:
                yield stack
                stack = []
        stack.append(number)
    yield stack


def _cut(stack: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Each without its rows of zeros."""
    return [one if len(one) == len(other) else one[: len(other)] for one, other in zip(stack, like, strict=True)]
