"""A multistep solver that is being learned, and two gradients of how far it ends from its teacher.

Of the loss ``|x_K - x_teacher|²`` (mean), into weights, scales and guidance:

- ``full``: through all calls, each recomputed in the backward pass;
- ``shortcut``: outputs are data, so ``x_K`` is the linear path and the network is never run backwards. How an output
  changes with the level that it is asked at is a difference of two calls, taken at one call of a part of the samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdo_cli.sampling.guidance import Guided
from sdo_cli.sampling.loop import Path
from sdo_cli.sampling.multistep import Levels, clock_of
from sdo_cli.skipping.multistep import Multistep

# ask(call, latents [B, …], level []) -> (output [B, …],), or with guidance those without and with the prompt
Ask = Callable[[int, Tensor, Tensor], tuple[Tensor, ...]]
# the difference of levels behind a derivative
DELTA = 0.02


@dataclass
class Student:
    """What is learned, beside what is fixed.

    Attributes:
        grid: ``t_0 … t_K``.
        start: weights to begin with, ``[K, window]``, newest slope first.
        moves: ``[K, window]``, how far they have moved; 1 moves the clock by the level that the step goes to, so that
            from a level of pure noise (4096, with zero terminal SNR) as much can be learned as from others.
        log_scales: ``[K]``.
        multiples: of the guidance scale, ``[K]``.
        guidance: the scale.
    """

    grid: list[float]
    levels: Levels
    start: Tensor
    moves: Tensor
    log_scales: Tensor
    multiples: Tensor
    guidance: float = 1.0

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.moves, self.log_scales, self.multiples

    @property
    def weights(self) -> Tensor:
        sizes = [min(1.0, there / (here - there)) for here, there in pairwise(self.grid[:-1])]
        return self.start + torch.tensor([*sizes, 1.0], dtype=torch.float64)[:, None] * self.moves

    @property
    def numbers(self) -> Multistep:
        rows = self.weights.detach().tolist()
        known = tuple(tuple(row[: i + 1]) for i, row in enumerate(rows))
        multiples = self.multiples.detach()
        steered = () if bool((multiples == 1).all()) else tuple(multiples.tolist())
        return Multistep(known, tuple(self.log_scales.detach().exp().tolist()), steered)

    def joined(self, i: int, parts: tuple[Tensor, ...]) -> Tensor:
        """The output of call i with its guidance."""
        if len(parts) == 1:
            return parts[0]
        free, cond = parts
        return free + _of(self.guidance * self.multiples[i], free) * (cond - free)

    def latents(self, x: Tensor, ask: Ask) -> Tensor:
        """``x_K`` of the first latents ``x [B, …]``, differentiable in weights and scales."""
        rows = [row[: i + 1] for i, row in enumerate(self.weights)]
        clock, asked = clock_of(self.grid, rows, list(self.log_scales.exp()))
        slopes: list[Tensor] = []
        for i, row in enumerate(rows):
            e = self.joined(i, ask(i, x, asked[i]))
            slopes.insert(0, (x - self.levels.image(x, e, _of(asked[i], x))) / _of(clock[i], x))
            step = (self.grid[i + 1] - clock[i]) * row
            x = x + sum(_of(w, x) * slope for w, slope in zip(step, slopes, strict=False))
        return x


def _of(scalar: Any, x: Tensor) -> Any:
    """A float64 scalar as the latents are, its gradient flowing."""
    return scalar.to(x) if isinstance(scalar, Tensor) else scalar


def asking(path: Path, levels: Levels, rows: Tensor | None = None) -> Ask:
    """The path's network at any level, for the samples ``rows``."""
    rows = path.rows if rows is None else rows

    def ask(i: int, x: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        del i
        t = levels.timestep(level).to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        shown, network = levels.scaled(x, _of(level, x)), path.denoise
        if isinstance(network, Guided) and network.scale != 1.0:
            return network.pair(shown, t, rows)
        return (network(shown, t, rows),)

    return ask


def full_gradient(student: Student, x: Tensor, target: Tensor, ask: Ask) -> float:
    """The loss of latents begun at ``x``; its gradient is added to all that is learned, through all calls."""

    def again(i: int, x: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = checkpoint(lambda x, level: ask(i, x, level), x, level, use_reentrant=False)
        return found

    with torch.enable_grad():
        loss = (student.latents(x, again) - target).square().mean()
        loss.backward()
    return loss.item()


def shortcut_gradient(
    student: Student, x: Tensor, target: Tensor, ask: Ask, *, at: int | None = None, some: Tensor | None = None,
    ask_some: Ask | None = None,
) -> float:  # fmt: skip
    """The same along the linear path: outputs are data.

    Args:
        at: the call whose change with its level is looked at, for all calls; None looks at none.
        some: the samples it is looked at on; of all by default.
        ask_some: the network for these.
    """
    outputs, inputs, asked = list[tuple[Tensor, ...]](), list[Tensor](), list[Tensor]()

    def note(i: int, x: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        inputs.append(x)
        asked.append(level)
        outputs.append(ask(i, x, level))
        return outputs[-1]

    with torch.no_grad():
        student.latents(x, note)
        slopes = None
        if at is not None:
            rows = torch.arange(len(x), device=x.device) if some is None else some
            moved = asked[at] * (1 + DELTA)
            changed = (ask_some or ask)(at, inputs[at][rows], moved)
            # one call stands for all, and some samples for all
            factor = len(outputs) * len(x) / len(rows)
            slopes = [
                torch.zeros_like(x).index_copy(0, rows, factor * (new - old[rows]) / (moved - asked[at]).to(x))
                for new, old in zip(changed, outputs[at], strict=True)
            ]

    def given(i: int, x: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        if i != at or slopes is None:
            return outputs[i]
        further = _of(level - level.detach(), x)
        return tuple(e + further * slope for e, slope in zip(outputs[i], slopes, strict=True))

    with torch.enable_grad():
        loss = (student.latents(x, given) - target).square().mean()
        loss.backward()
    return loss.item()
