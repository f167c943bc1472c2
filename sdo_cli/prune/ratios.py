"""From keep-scores to a plan of the asked cost (DiP-GO's post-processing)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.skipping.liveness import Wiring, live


@dataclass(frozen=True)
class Budget:
    """What a table of computed units costs, as a share of the whole network at every call.

    Attributes:
        shares: ``[units]`` float64, of one call.
        rest: share of a call that is not in units and is run whenever the network is called.
        every_call: the network is called even where no unit is computed.
    """

    shares: Tensor
    rest: float
    every_call: bool

    def kept(self, runs: Tensor) -> float:
        """Of ``runs [calls, units]``, 0 … 1."""
        called = len(runs) if self.every_call else int(runs.any(1).sum())
        return float((runs.double() @ self.shares).sum() + self.rest * called) / len(runs)

    def allows(self, runs: Tensor, ratio: float) -> bool:
        """Whether at least ``ratio`` of the computation is left out."""
        return self.kept(runs) <= 1 - ratio + 1e-9


def runs_at(ratio: float, scores: Tensor, wiring: Wiring, budget: Budget) -> Tensor:
    """``[calls, units]``: what is computed when the gates with the best scores are open, as many as the budget allows.

    One global threshold, found by bisection; what nobody reads is not computed. Equal scores are cut by rank, so that
    every ratio can be met to within one unit of one call. The first call is computed whatever the budget.

    Args:
        ratio: share of the computation that is left out at least, 0 … 1.
        scores: ``[calls, units]``, higher is kept sooner.
    """
    calls, units = scores.shape
    order = scores[1:].flatten().double().argsort(descending=True, stable=True)

    def with_best(count: int) -> Tensor:
        gates = torch.zeros((calls - 1) * units, dtype=torch.bool)
        gates[order[:count]] = True
        return live(torch.cat([torch.ones(1, units, dtype=torch.bool), gates.view(calls - 1, units)]), wiring)

    low, high = 0, len(order)
    found = with_best(high)
    if budget.allows(found, ratio):
        return found
    # invariant: `high` does not fit; `low` does, or is the first call alone
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.allows(with_best(middle), ratio) else (low, middle)
    return with_best(low)
