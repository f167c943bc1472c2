"""Learned linear multistep solvers: their numbers, and the arithmetic that sampling and learning share.

Steps go along slopes in the coordinate in which every latent is ``x = x0 + t ε`` (t is σ/α; of flow models the time,
and ``x = (1 - t) x0 + t ε``). With a grid ``t_0 > … > t_K`` and a clock that begins at ``t_0``, call i asks the network
at the level ``s_i · clock_i``:

    d_i         = (x_i - D(x_i, s_i clock_i)) / clock_i                D: the prediction of x0
    x_{i+1}     = x_i + (t_{i+1} - clock_i) Σ_j W_ij d_{i-j}           rows of W need not add up to one
    clock_{i+1} = clock_i + (t_{i+1} - clock_i) Σ_j W_ij

(DyWeight, arXiv 2603.11607). The final latent stays affine in the first one and the outputs, so every gradient rule
works. Imports no diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdo_cli.skipping.multistep import Multistep

# Adams-Bashforth of order one to four, newest slope first (Zhang & Chen 2022, arXiv 2204.13902, appendix B)
SLOPES = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
WINDOWS = range(1, len(SLOPES) + 1)


def adams_bashforth(calls: int, window: int = 3) -> Multistep:
    """iPNDM's coefficients with at most ``window`` slopes; the last step, like the first, goes along its own alone."""
    orders = [1 if i == calls - 1 else min(i + 1, window) for i in range(calls)]
    rows = (SLOPES[order - 1] for order in orders)
    # of equal lengths as far as slopes are known, so that what starts at 0 can be learned
    padded = (row + (0.0,) * (min(i + 1, window) - len(row)) for i, row in enumerate(rows))
    return Multistep(tuple(padded), (1.0,) * calls)


def clock_of(
    grid: Sequence[Any], weights: Sequence[Sequence[Any]], scales: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """What the clock says before every call, and the level every call asks at; floats, or scalar tensors.

    Args:
        grid: ``t_0 … t_K``.
    """
    clock, asked = [grid[0]], []
    for i, (row, scale) in enumerate(zip(weights, scales, strict=True)):
        asked.append(scale * clock[i])
        clock.append(clock[i] + (grid[i + 1] - clock[i]) * sum(row))
    return clock[:-1], asked


def out_of_order(grid: Sequence[float], numbers: Multistep) -> bool:
    """Whether the clock leaves the levels there are: not above 0, or over the first one by more than half."""
    clock, asked = clock_of(grid, numbers.weights, numbers.scales)
    return not all(0 < t <= 1.5 * grid[0] for t in (*clock, *asked))


@dataclass(frozen=True)
class Levels:
    """What a network's output means at a level.

    Attributes:
        prediction: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.
        log_levels: log of σ/α at every training timestep; of a flow model empty.
        steps: how many training timesteps there are.
    """

    prediction: str
    log_levels: Tensor
    steps: int = 1000

    @property
    def flow(self) -> bool:
        return self.prediction == "flow_prediction"

    def image(self, x: Tensor, e: Tensor, level: Any) -> Tensor:
        """The prediction of x0, ``x`` and ``e`` ``[B, …]``."""
        if self.prediction == "v_prediction":
            return x / (level**2 + 1) - e * level / (level**2 + 1) ** 0.5
        return e if self.prediction == "sample" else x - level * e

    def scaled(self, x: Tensor, level: Any) -> Tensor:
        """What the network is shown."""
        return x if self.flow else x / (level**2 + 1) ** 0.5

    def timestep(self, level: Tensor) -> Tensor:
        """What the network is told of levels ``[K]`` or ``[]``; between training timesteps by the log of the level."""
        if self.flow:
            return level * self.steps
        known = self.log_levels.to(level)
        here = level.log().clamp(known[0], known[-1])
        above = torch.searchsorted(known, here.detach()).clamp(1, len(known) - 1)
        low, high = known[above - 1], known[above]
        return above - 1 + (here - low) / (high - low)

    @property
    def last(self) -> float:
        """The lowest level the network knows."""
        return 1 / self.steps if self.flow else float(self.log_levels[0].exp())
