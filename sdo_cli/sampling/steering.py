"""Guidance whose scale and condition may differ at every noise level and want gradients of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.sampling.guidance import Condition, Network, concat, select


@dataclass(frozen=True)
class Steered:
    """Like :class:`~sdo_cli.sampling.guidance.Guided`, with values by noise level.

    A level is a timestep of the route, so calls at the same timestep (PNDM's second) share their values.

    Attributes:
        condition: ``[1, B, …]`` each, shared by all levels, or ``[levels, B, …]``.
        negative: ``[B, …]`` each; None computes the conditional branch alone.
        scale: guidance scale s, ``[1, B]`` or ``[levels, B]``; without meaning when ``negative`` is None.
        levels: their timesteps, ``[levels]``, each once.
    """

    network: Network
    condition: Condition
    negative: Condition | None
    scale: Tensor
    levels: Tensor

    def split(self, x: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """What the network says of the samples ``rows``: ``(e_cond,)``, or ``(e_uncond, e_cond - e_uncond)``."""
        condition = {key: self._at(value, t, rows) for key, value in self.condition.items()}
        if self.negative is None:
            return (self.network(x, t, condition),)
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), concat(select(self.negative, rows), condition))
        e_uncond, e_cond = both.chunk(2)
        return e_uncond, e_cond - e_uncond

    def join(self, parts: tuple[Tensor, ...], t: Tensor, rows: Tensor) -> Tensor:
        """``e_uncond + s (e_cond - e_uncond)``: linear in s, so it stands outside the network."""
        if len(parts) == 1:
            return parts[0]
        e_uncond, towards = parts
        s = self._at(self.scale, t, rows)
        return e_uncond + s.view(-1, *[1] * (towards.dim() - 1)) * towards

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self.join(self.split(x, t, rows), t, rows)

    def held(self) -> "Steered":
        """The same with scales that are constants."""
        return Steered(self.network, self.condition, self.negative, self.scale.detach(), self.levels)

    def add_to_scales(self, gradient: Tensor, t: Tensor, rows: Tensor) -> None:
        """Accumulate ``[R]`` into the scales of these samples at their timesteps."""
        if self.scale.grad is None:
            self.scale.grad = torch.zeros_like(self.scale)
        self.scale.grad.index_put_((self._level(self.scale, t), rows), gradient.to(self.scale), accumulate=True)

    def _at(self, value: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return value[self._level(value, t), rows]

    def _level(self, value: Tensor, t: Tensor) -> Tensor:
        if len(value) == 1:
            return torch.zeros(len(t), dtype=torch.long, device=value.device)
        return (t[:, None] == self.levels.to(t.device)).long().argmax(1)
