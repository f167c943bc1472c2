"""Classifier-free guidance around a network, for any subset of a batch and a timestep per sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Everything a network needs beside latent and timestep; each tensor has the batch first.
Condition = dict[str, Tensor]
# network(x [B,…], t [B], condition) -> native output [B,…]
Network = Callable[[Tensor, Tensor, Condition], Tensor]


def select(condition: Condition, rows: Tensor) -> Condition:
    """The condition of some samples."""
    return {key: value[rows.to(value.device)] for key, value in condition.items()}


def concat(first: Condition, second: Condition) -> Condition:
    return {key: torch.cat([first[key], second[key]]) for key in first}


@dataclass(frozen=True)
class Guided:
    """``e = e_uncond + s (e_cond - e_uncond)``; with ``s = 1`` the unconditional branch is not computed.

    Args:
        network: the plain network.
        condition, negative: for the whole batch; ``negative`` may be None when ``scale`` is 1.
        scale: guidance scale s.
        negative_gradient: False stops the gradient of the unconditional branch.
    """

    network: Network
    condition: Condition
    negative: Condition | None
    scale: float
    negative_gradient: bool = True

    def __post_init__(self) -> None:
        if self.scale != 1.0 and self.negative is None:
            raise ValueError(f"guidance scale {self.scale} needs the condition of a negative prompt")

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Network output after guidance for the samples ``rows`` of the batch.

        Args:
            x: scaled latents ``[len(rows), C, h, w]``.
            t: one timestep per sample, ``[len(rows)]``.
        """
        cond = select(self.condition, rows)
        if self.scale == 1.0 or self.negative is None:
            return self.network(x, t, cond)
        free = select(self.negative, rows)
        if torch.is_grad_enabled() and not self.negative_gradient:
            with torch.no_grad():
                e_uncond = self.network(x, t, free)
            e_cond = self.network(x, t, cond)
        else:
            both = self.network(torch.cat([x, x]), torch.cat([t, t]), concat(free, cond))
            e_uncond, e_cond = both.chunk(2)
        return e_uncond + self.scale * (e_cond - e_uncond)
