"""A gradient rule's whole decision, as data: at which network calls of which samples gradients flow."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Mode(IntEnum):
    """How gradients pass one network call. The solver's linear path is always kept."""

    FROZEN = 0  # the output is a constant
    WEIGHTS = 1  # graph through the weights, input detached
    THROUGH = 2  # graph through weights and input


@dataclass(frozen=True)
class Plan:
    """Attributes:
    mode: ``[calls, B]`` of :class:`Mode`, int64 on the CPU.
    weight: ``[calls, B]``, what the gradient through this call is multiplied with (1/p_i for an unbiased
        estimate of the sum over all calls).
    """

    mode: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if self.mode.shape != self.weight.shape or self.mode.dim() != 2:
            raise ValueError(f"mode {tuple(self.mode.shape)} and weight {tuple(self.weight.shape)} must be [calls, B]")

    @property
    def calls(self) -> int:
        return self.mode.shape[0]

    @property
    def batch(self) -> int:
        return self.mode.shape[1]

    @property
    def live(self) -> Tensor:
        """``[calls, B]`` bool: where the network is run with a graph."""
        return self.mode != Mode.FROZEN

    def rows(self, rows: slice) -> "Plan":
        """The plan of some samples of the batch."""
        return Plan(self.mode[:, rows], self.weight[:, rows])

    def is_one_step_deep(self) -> bool:
        """True when no live call depends on an earlier live one: the three-stage engine serves it.

        A first live call may be THROUGH: nothing live stands before it, so its input carries no graph.
        """
        earlier_live = self.live.long().cumsum(0) - self.live.long()
        return not bool(((self.mode == Mode.THROUGH) & (earlier_live > 0)).any())


# rule(calls, batch, coefficients, generator, options…) -> Plan
Rule = Callable[..., Plan]


def empty(calls: int, batch: int) -> tuple[Tensor, Tensor]:
    """All-FROZEN mode and zero weight, to be filled in by a rule."""
    return torch.zeros(calls, batch, dtype=torch.long), torch.zeros(calls, batch, dtype=torch.float64)
