"""Gates that nobody learned, and the searches DiP-GO was compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from sdo_cli.prune.ratios import kept_share, runs_at
from sdo_cli.skipping.liveness import Wiring, live


def every(calls: int, k: int) -> Tensor:
    """``[calls]`` bool: true at the first call and at ``k`` calls spread evenly."""
    chosen = torch.zeros(calls, dtype=torch.bool)
    chosen[torch.arange(k) * calls // k] = True
    return chosen


def uniform(ratio: float, calls: int, wiring: Wiring, shares: Tensor) -> Tensor:
    """Whole calls at even intervals, their output repeated in between: ``[calls, units]``."""
    del shares
    k = max(1, int((1 - ratio) * calls + 1e-9))
    return live(every(calls, k)[:, None].expand(calls, len(wiring.units)), wiring)


def deep_cache(ratio: float, calls: int, wiring: Wiring, shares: Tensor) -> Tensor:
    """Whole calls at even intervals, between them only the units nearest to the output (DeepCache, Ma et al. 2023,
    arXiv 2312.00858).

    Fewer whole calls the higher the ratio; where the shallow units alone exceed the budget it is :func:`uniform`.
    """
    shallow = torch.zeros(len(wiring.units), dtype=torch.bool)
    shallow[_shallow(wiring, shares)] = True
    best = uniform(ratio, calls, wiring, shares)
    for k in range(1, calls + 1):
        gates = every(calls, k)[:, None] | shallow[None]
        runs = live(gates, wiring)
        if kept_share(runs, shares) > 1 - ratio + 1e-9:
            return best
        best = runs
    return best


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


def random_gates(ratio: float, calls: int, wiring: Wiring, shares: Tensor, *, generator: torch.Generator) -> Tensor:
    """Gates by chance."""
    return runs_at(ratio, torch.rand(calls, len(wiring.units), generator=generator), wiring, shares)


# baseline(ratio, calls, wiring, shares) -> runs
Baseline = Callable[[float, int, Wiring, Tensor], Tensor]
BASELINES: dict[str, Baseline] = {"uniform": uniform, "deepcache": deep_cache}
