"""From keep-scores to a plan of the asked cost (DiP-GO's post-processing)."""

import torch
from torch import Tensor

from sdo_cli.skipping.liveness import Wiring, live


def runs_at(ratio: float, scores: Tensor, wiring: Wiring, shares: Tensor) -> Tensor:
    """``[calls, units]``: what is computed when the gates with the best scores are open, as many as the budget allows.

    One global threshold, found by bisection; what nobody reads is not computed. Equal scores are cut by rank, so that
    every ratio can be met to within one unit of one call.

    Args:
        ratio: share of the computation that is left out at least, 0 … 1.
        scores: ``[calls, units]``, higher is kept sooner.
        shares: of the units, summing to 1.
    """
    calls, units = scores.shape
    order = scores[1:].flatten().double().argsort(descending=True, stable=True)

    def with_best(count: int) -> Tensor:
        gates = torch.zeros((calls - 1) * units, dtype=torch.bool)
        gates[order[:count]] = True
        return live(torch.cat([torch.ones(1, units, dtype=torch.bool), gates.view(calls - 1, units)]), wiring)

    low, high = 0, len(order)
    found = with_best(high)
    if kept_share(found, shares) <= 1 - ratio + 1e-9:
        return found
    # invariant: `low` fits the budget (no gate open costs one call), `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept_share(with_best(middle), shares) <= 1 - ratio + 1e-9 else (low, middle)
    return with_best(low)


def kept_share(runs: Tensor, shares: Tensor) -> float:
    """The share of what can be skipped that ``runs [calls, units]`` computes."""
    return float((runs.double() @ shares).mean())
