"""MoFaSGD in a training step: gradients become two thin products as soon as they are there, and are freed.

A hook on every matrix turns its gradient G into GV and GᵀU (``low_rank``). These are the gradients of the trace of UᵀGV
by U and by V, and stand as such in the bases' ``.grad``: so they are added up over passes here, and over processes by
what adds up any gradients. What is no matrix keeps its gradient and goes to AdamW.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.optimizers.low_rank import move, project, start
from sdo_cli.optimizers.together import Together
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.recipe.schema import Recipe
from sdo_cli.seeding import keyed_generator

# layers whose weight is a matrix, rows by everything else
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrices_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of linear layers and convolutions, and everything else: biases, norms, embeddings."""
    layers = {id(module.weight) for module in model.modules() if isinstance(module, LAYERS)}
    return [p for p in parameters if id(p) in layers], [p for p in parameters if id(p) not in layers]


@dataclass(frozen=True)
class Matrix:
    """A weight and its momentum; ``U.grad`` and ``V.grad`` hold GV and GᵀU of the step that is being made."""

    weight: nn.Parameter
    U: nn.Parameter
    S: Tensor
    V: nn.Parameter

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U.data, self.S, self.V.data

    @property
    def sides(self) -> list[tuple[Tensor, Tensor]]:
        """Its bases with this step's products."""
        return [(base.data, base.grad) for base in (self.U, self.V) if base.grad is not None]

    @torch.no_grad()
    def take(self, *_: Any) -> None:
        """The weight's gradient becomes a part of the products."""
        assert self.weight.grad is not None
        # half precision would spoil sums over passes
        with torch.autocast(self.U.device.type, enabled=False):
            for base, product in zip(
                (self.U, self.V), project(self.weight.grad.flatten(1), self.U, self.V), strict=True
            ):
                base.grad = product if base.grad is None else base.grad.add_(product)
        self.weight.grad = None


class MoFaSGD:
    """Takes the place of the optimizer, of clipping, of the look for numbers that are not finite and of the sum.

    Args:
        parameters: everything that is trained.
        adamw: over those that are no ``matrices``. A schedule of the rate works on it; its rate is that of all.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World = SINGLE,
        *,
        matrices: Sequence[nn.Parameter],
        parameters: Sequence[nn.Parameter],
        adamw: torch.optim.Optimizer,
    ) -> None:
        self.recipe, self.world, self.adamw = recipe, world, adamw
        taken = set(map(id, matrices))
        self.others = [parameter for parameter in parameters if id(parameter) not in taken]
        self.matrices = [_begin(recipe, number, weight) for number, weight in enumerate(matrices)]
        world.make_same(self._bases)

    @property
    def _bases(self) -> list[nn.Parameter]:
        return [base for matrix in self.matrices for base in (matrix.U, matrix.V)]

    def backward(self, total: Tensor) -> None:
        """Gradients of ``total`` into this step's; of matrices none is kept whole."""
        hooks = [matrix.weight.register_post_accumulate_grad_hook(matrix.take) for matrix in self.matrices]
        try:
            total.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def step(self) -> float:
        """Sum over the processes, clip, step, clear.

        Returns:
            The norm before clipping, of matrices the part of their gradient that the step sees, |Ĝ|. Where it is not
            finite nothing is changed.
        """
        for matrix in self.matrices:
            # of a pass that was not made by :meth:`backward`
            if matrix.weight.grad is not None:
                matrix.take()
        self.world.add_gradients([*self._bases, *self.others])
        groups = [
            (few, Together([side for matrix in few for side in matrix.sides]))
            for few in _of_one_rank([matrix for matrix in self.matrices if matrix.U.grad is not None])
        ]
        norm = self._norm([together for _, together in groups])
        if math.isfinite(norm):
            self._apply(groups, min(1.0, self.recipe.max_grad_norm / (norm + 1e-6)))
        self.drop()
        return norm

    def drop(self) -> None:
        """Forget this step's gradients."""
        for holder in (*self._bases, *self.others, *(matrix.weight for matrix in self.matrices)):
            holder.grad = None

    @torch.no_grad()
    def _norm(self, groups: list[Together]) -> float:
        rest = [parameter.grad for parameter in self.others if parameter.grad is not None]
        norms = torch._foreach_norm(rest) if rest else []
        squares = [*(norm.square() for norm in norms), *(group.norm_squared() for group in groups)]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    @torch.no_grad()
    def _apply(self, groups: list[tuple[list[Matrix], Together]], share: float) -> None:
        """A step with ``share`` of the gradients."""
        recipe, rate = self.recipe, self.adamw.param_groups[0]["lr"]
        for few, together in groups:
            S = torch.stack([matrix.S for matrix in few])
            S, along = together.step(S, recipe.optimizer_beta, share, recipe.optimizer_form)
            torch._foreach_copy_([matrix.S for matrix in few], list(S.unbind()))
            for matrix, mine, V in zip(few, along[::2], along[1::2], strict=True):
                move(matrix.weight.data, mine, V, rate=rate, decay=recipe.adam_weight_decay)
        rest = [parameter.grad for parameter in self.others if parameter.grad is not None]
        if rest:
            torch._foreach_mul_(rest, share)
        self.adamw.step()
        self._stay_same()

    def _stay_same(self) -> None:
        """Equal numbers have equal decompositions on equal machines only; on others U and V may have other signs."""
        if self.world.size == 1:
            return
        mark = _bits(self._bases)
        if self.world.largest(mark) != -self.world.largest(-mark):
            self.world.make_same([*self._bases, *(nn.Parameter(matrix.S) for matrix in self.matrices)])

    def take_weights(self) -> None:
        """Weights were given other values: nothing here is a copy of them."""

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the momentum of every matrix."""
        return {**self.adamw.state_dict(), "momentum": [list(matrix.tensors) for matrix in self.matrices]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: of other matrices, or of another rank.
        """
        kept = state["momentum"]
        shapes = [[tuple(tensor.shape) for tensor in matrix.tensors] for matrix in self.matrices]
        if [[tuple(tensor.shape) for tensor in of_one] for of_one in kept] != shapes:
            raise ValueError(
                f"it holds the momentum of {len(kept)} matrices, this run has {len(shapes)}, or other ranks"
            )
        self.adamw.load_state_dict({key: value for key, value in state.items() if key != "momentum"})
        for matrix, of_one in zip(self.matrices, kept, strict=True):
            for tensor, value in zip(matrix.tensors, of_one, strict=True):
                tensor.copy_(value)


def _begin(recipe: Recipe, number: int, weight: nn.Parameter) -> Matrix:
    """A weight without momentum, its bases the same in every process."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, columns = len(weight), weight[0].numel()
    drawn = start(rows, columns, recipe.optimizer_rank, keyed_generator(recipe.seed, "mofasgd", 0, number), dtype)
    U, S, V = (tensor.to(weight.device) for tensor in drawn)
    return Matrix(weight, nn.Parameter(U, requires_grad=False), S, nn.Parameter(V, requires_grad=False))


def _of_one_rank(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Groups of the same rank and precision."""
    groups: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.S.shape, matrix.S.dtype), []).append(matrix)
    yield from groups.values()


def _bits(tensors: Sequence[Tensor]) -> int:
    """A number that changes with any bit of them."""
    kinds, sums = {torch.float32: torch.int32, torch.float64: torch.int64}, []
    for tensor in tensors:
        bits = tensor.data.view(kinds[tensor.dtype]).flatten().long()
        # by their place: signs that turn in pairs would cancel out
        sums.append((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum())
    return int(torch.stack(sums).sum()) % 2**61
