"""Gates that nobody learned, and the searches DiP-GO was compared with."""

import torch
from torch import Tensor

from sdo_cli.prune.ratios import Budget, runs_at
from sdo_cli.skipping.liveness import Wiring, live


def every(calls: int, k: int) -> Tensor:
    """``[calls]`` bool: true at the first call and at ``k`` calls spread evenly."""
    chosen = torch.zeros(calls, dtype=torch.bool)
    chosen[torch.arange(k) * calls // k] = True
    return chosen


def uniform(ratio: float, calls: int, wiring: Wiring, budget: Budget) -> Tensor:
    """Whole calls at even intervals, their output repeated in between: ``[calls, units]``."""
    return _most(ratio, calls, wiring, budget, torch.zeros(len(wiring.units), dtype=torch.bool))


def deep_cache(ratio: float, calls: int, wiring: Wiring, budget: Budget) -> Tensor:
    """Whole calls at even intervals, between them only the units nearest to the output (DeepCache, Ma et al. 2023,
    arXiv 2312.00858); :func:`uniform` where these alone exceed the budget."""
    shallow = torch.zeros(len(wiring.units), dtype=torch.bool)
    shallow[_shallow(wiring, budget.shares)] = True
    found = _most(ratio, calls, wiring, budget, shallow)
    return found if budget.allows(found, ratio) else uniform(ratio, calls, wiring, budget)


def _most(ratio: float, calls: int, wiring: Wiring, budget: Budget, between: Tensor) -> Tensor:
    """As many whole calls as the budget allows, at least one, and the units ``between`` at all others."""
    found = live(every(calls, 1)[:, None] | between[None], wiring)
    for k in range(2, calls + 1):
        runs = live(every(calls, k)[:, None] | between[None], wiring)
        if not budget.allows(runs, ratio):
            break
        found = runs
    return found


def _shallow(wiring: Wiring, shares: Tensor) -> list[int]:
    """The cheapest way from the first unit, which reads the latent, to the output: the outermost skip connection."""
    cost, before = {0: float(shares[0])}, dict[int, int]()
    for b, read in enumerate(wiring.reads):
        if reached := [number for number in read if number in cost]:
            before[b] = min(reached, key=cost.__getitem__)
            cost[b] = cost[before[b]] + float(shares[b])
    way = [min((number for number in wiring.output if number in cost), key=cost.__getitem__)]
    while way[-1] in before:
        way.append(before[way[-1]])
    return way


def random_gates(ratio: float, calls: int, wiring: Wiring, budget: Budget, *, generator: torch.Generator) -> Tensor:
    """Gates by chance."""
    return runs_at(ratio, torch.rand(calls, len(wiring.units), generator=generator), wiring, budget)
