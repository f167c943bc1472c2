"""The numbers of a learned solver, as a plan's file has them; :mod:`sdo_cli.sampling.multistep` says what they mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Multistep:
    """Attributes:
    weights: W, a row per call, newest slope first; a call has as many as slopes are known, at most the window.
    scales: s, one per call; the network is asked at this multiple of the clock.
    guidance: one per call, the multiple of the guidance scale that it gets; empty where all get the scale itself.
    """

    weights: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    guidance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = [*self.scales, *(w for row in self.weights for w in row)]
        if len(self.weights) != len(self.scales) or not self.weights:
            raise ValueError(
                f"{len(self.weights)} rows of weights and {len(self.scales)} scales: a solver has one each"
            )
        if self.guidance and len(self.guidance) != len(self.scales):
            raise ValueError(f"{len(self.guidance)} multiples of guidance for {len(self.scales)} calls")
        if any(not 1 <= len(row) <= i + 1 for i, row in enumerate(self.weights)):
            raise ValueError("a call weighs its own slope and those before it, no others")
        if not all(math.isfinite(number) for number in (*numbers, *self.guidance)) or min(self.scales) <= 0:
            raise ValueError("weights must be finite, and scales above 0")

    @property
    def calls(self) -> int:
        return len(self.scales)

    def tree(self) -> dict[str, Any]:
        steered = {"guidance": list(self.guidance)} if self.guidance else {}
        return {"weights": [list(row) for row in self.weights], "scales": list(self.scales), **steered}


def multistep_of(tree: Mapping[str, Any]) -> Multistep:
    """Read back what :meth:`Multistep.tree` made; raises ValueError, TypeError, KeyError."""
    rows = tuple(tuple(float(w) for w in row) for row in tree["weights"])
    scales = tuple(float(s) for s in tree["scales"])
    return Multistep(rows, scales, tuple(float(g) for g in tree.get("guidance", ())))
