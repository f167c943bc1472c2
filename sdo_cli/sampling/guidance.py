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
        multiples: timesteps ``[K]``, and what multiplies ``scale`` at the one nearest to a sample's, ``[K]``.
    """

    network: Network
    condition: Condition
    negative: Condition | None
    scale: float
    negative_gradient: bool = True
    multiples: tuple[Tensor, Tensor] | None = None

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
        if torch.is_grad_enabled() and not self.negative_gradient:
            with torch.no_grad():
                e_uncond = self.network(x, t, select(self.negative, rows))
            e_cond = self.network(x, t, cond)
        else:
            e_uncond, e_cond = self.pair(x, t, rows)
        return e_uncond + self._scale_at(t, x) * (e_cond - e_uncond)

    def pair(self, x: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says without and with the prompt, in one call; only where there is guidance."""
        assert self.negative is not None
        both = select(self.negative, rows), select(self.condition, rows)
        e_uncond, e_cond = self.network(torch.cat([x, x]), torch.cat([t, t]), concat(*both)).chunk(2)
        return e_uncond, e_cond

    def _scale_at(self, t: Tensor, x: Tensor) -> Tensor | float:
        if self.multiples is None:
            return self.scale
        known, multiples = (values.to(t.device, torch.float64) for values in self.multiples)
        nearest = (t.double()[:, None] - known).abs().argmin(1)
        return (self.scale * multiples[nearest]).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
