"""What engines take and give."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdo_cli.gradients.live import Kept


@dataclass(frozen=True)
class Scored:
    """Attributes:
    losses: ``[R]``, what is minimised, one per sample.
    rewards: by name, ``[R]`` each, detached; for reports.
    uncertainty: how far the rewards may be off, ``[R]``, detached; None where nothing tells.
    """

    losses: Tensor
    rewards: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None


# objective(x_N [R,…], rows [R]) -> Scored; each sample on its own, no batch statistics
Objective = Callable[[Tensor, Tensor], Scored]


@dataclass(frozen=True)
class Terms:
    """How the total loss is put together: ``Σ losses / divisor + kl_weight · Σ penalties / divisor``.

    Attributes:
        divisor: the batch size when None.
        kl_weight: of the penalty mean (ε_θ - ε_base)², per sample the mean over its live calls (DRaFT+).
        kl_gate: only samples more uncertain than this have that penalty; 0: all.
        proximal: of the penalty mean (e - e of the rollout)², alike, at an update after a rollout's first.
        scale: what every backward pass is multiplied with, so that fp16 gradients do not vanish; parameters' gradients
            come out multiplied with it, everything else does not.
        backward: how what is made of the network is sent back; DeepSpeed wants it by its own hands.
        last_backward: the same for the very last pass of a step, during which gradients become final.
    """

    divisor: float | None = None
    kl_weight: float = 0.0
    proximal: float = 0.0
    scale: float = 1.0
    backward: Callable[[Tensor], None] = Tensor.backward
    last_backward: Callable[[Tensor], None] | None = None
    kl_gate: float = 0.0

    @property
    def closing(self) -> Callable[[Tensor], None]:
        return self.last_backward or self.backward

    def gate(self, uncertainty: Tensor | None) -> Tensor | None:
        """Which samples are held near the base, ``[B]`` of 0 and 1, a constant; None: all.

        Raises:
            ValueError: there is a gate, and the objective does not say how uncertain it is.
        """
        if not self.kl_weight or not self.kl_gate:
            return None
        if uncertainty is None:
            raise ValueError("kl_gate needs an objective that says how uncertain it is")
        return (uncertainty > self.kl_gate).to(uncertainty.dtype)


@dataclass
class Outcome:
    """Result of one pass. Gradients are in the parameters' ``.grad`` (and in ``x_0.grad`` when it wants one).

    Attributes:
        x_N: latents the reward saw ``[B, …]``: final ones, or x0-predictions where the plan ends earlier.
        g: gradient of the total loss with respect to ``x_N``, ``[B, …]``.
        seconds: wall-clock by stage.
        calls: network calls ``{"no_grad": n, "grad": n}``, counted per sample.
        penalties: ``[B]`` of the regulariser, before ``kl_weight``, 0 where its gate is closed; None when it is off.
        uncertainty: ``[B]`` of the objective; None where it does not say.
        changes: of the live calls' outputs since the rollout, relative, on the CPU; None at a rollout's first update.
        kept: what later updates go on with; None when there are none.
        looks: what the objective has noted of its gradients, ``[R]`` each, a piece of the batch after the other.
    """

    x_N: Tensor
    losses: Tensor
    rewards: dict[str, Tensor]
    g: Tensor
    seconds: dict[str, float]
    calls: dict[str, int]
    penalties: Tensor | None = None
    changes: Tensor | None = None
    kept: Kept | None = None
    uncertainty: Tensor | None = None
    looks: list[dict[str, Tensor]] = field(default_factory=list)


class Stopwatch:
    """Wall-clock per stage; on a GPU between events in its queue, so a stage owns its own work and nobody waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """By stage; waits for the last one."""
        if self.on_gpu and self._marks:
            self._marks[-1][2].synchronize()
        return added([{name: self._between(start, end)} for name, start, end in self._marks])

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start


def added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums by name; passes of one step may have run on different engines, with other stages."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def micro_batches(rows: Tensor, size: int | None) -> Iterator[Tensor]:
    """``rows`` in pieces of ``size`` (all at once for None)."""
    yield from rows.split(size or max(1, len(rows)))


def score_and_differentiate(
    objective: Objective, x_N: Tensor, *, divisor: float, micro: int | None, scale: float = 1.0
) -> tuple[Scored, Tensor]:
    """What the objective says of ``[B]`` samples, detached, and ``g = ∂(Σ losses / divisor)/∂x_N``; the graph holds
    decoder and reward only."""
    losses, gradients, rewards, doubts = [], [], [], []
    for rows in micro_batches(torch.arange(len(x_N), device=x_N.device), micro):
        leaf = x_N[rows].detach().requires_grad_()
        scored = objective(leaf, rows)
        (g,) = torch.autograd.grad(scale * (scored.losses.sum() / divisor), leaf)
        losses.append(scored.losses.detach())
        gradients.append(g / scale)
        rewards.append(scored.rewards)
        if scored.uncertainty is not None:
            doubts.append(scored.uncertainty)
    merged = {name: torch.cat([part[name] for part in rewards]) for name in rewards[0]}
    return Scored(torch.cat(losses), merged, torch.cat(doubts) if doubts else None), torch.cat(gradients)
