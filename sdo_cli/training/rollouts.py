"""Training's own rollouts when they are cheaper than sampling: how far from it they are, and when that ends."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.gradients.outcome import Outcome
from sdo_cli.sampling.guidance import Network
from sdo_cli.skipping.walking import Skips


@dataclass
class Rollouts:
    """Attributes:
    settings: of the solver.
    skips: what is left out of the network.
    network: draws, where it is not the one that is trained.
    share: FLOPs of its call over one of the network that is trained, guidance and adapters included, where counted.
    on: False once they have drifted too far; training then draws as it samples.
    """

    settings: DrawSettings
    skips: Skips | None = None
    network: Network | None = None
    share: float = 1.0
    on: bool = True


def distance_of(short: list[Outcome], full: list[Outcome]) -> tuple[float, float]:
    """Sum of squares of the difference of final latents, and of the full ones."""
    gap = sum(float((a.x_N - b.x_N).double().square().sum()) for a, b in zip(short, full, strict=True))
    return gap, sum(float(b.x_N.double().square().sum()) for b in full)


def flat_gradient(parameters: list[torch.nn.Parameter]) -> Tensor:
    """All of it as one vector, on the CPU in float64."""
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.detach().flatten().cpu() for p in parameters]
    return torch.cat([part.double() for part in parts])


def cosine(first: Tensor, second: Tensor) -> float:
    size = first.norm() * second.norm()
    return float((first @ second) / size) if size > 0 else float("nan")
