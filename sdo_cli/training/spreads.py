"""The spread of every reward, by which `combine.normalise` divides, so that weights compare."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# of what is known, how much a step keeps
DECAY = 0.95
# pictures that `spread-at-start` looks at before the first step; its error is then a tenth
AT_START = 64


class Spreads:
    """Mean and mean square of each reward over the global batches so far, older ones fading by ``DECAY`` a step.

        m ← β m + (1 - β) mean(r),   q ← β q + (1 - β) mean(r²),   both over 1 - βⁿ;   spread = √(q - m²)

    In float64 and over whole global batches in their order, so it is the same in any number of processes.

    Args:
        only: if not 0, so many samples are looked at before the first step, and nothing later counts. A reward that
            some pictures lose spreads further, so what divides by the running spread lets go of it just then.
    """

    def __init__(self, only: int = 0) -> None:
        self.steps, self.samples, self.only = 0, 0, only
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """One rollout's scores ``[global batch]`` by reward, finite."""
        if self.only and self.begun:
            return
        self.steps += 1
        self.samples += max(map(len, scores.values()))
        for name, values in scores.items():
            m, q = self._sums.get(name, (0.0, 0.0))
            exact = values.double()
            mean, square = exact.mean().item(), exact.square().mean().item()
            self._sums[name] = (DECAY * m + (1 - DECAY) * mean, DECAY * q + (1 - DECAY) * square)

    @property
    def begun(self) -> bool:
        """Whether enough is known for the first step."""
        return self.steps > 0 and self.samples >= self.only

    def of(self, name: str) -> float:
        """1 of a reward that nothing is known of, or that never changed."""
        if name not in self._sums:
            return 1.0
        whole = 1 - DECAY**self.steps
        m, q = (value / whole for value in self._sums[name])
        spread = math.sqrt(max(q - m * m, 0.0))
        # what is left of a difference of equal numbers is rounding
        return spread if spread > 1e-6 * abs(m) and spread > 0 else 1.0

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "samples": self.samples,
            "sums": {name: list(pair) for name, pair in self._sums.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.samples = state["steps"], state.get("samples", state["steps"])
        self._sums = {name: (m, q) for name, (m, q) in state["sums"].items()}
