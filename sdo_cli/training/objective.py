"""From final latents to the loss: decode, score, weigh."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rewards.base import Reward
from sdo_cli.gradients.outcome import Scored
from sdo_cli.models.base import Family

# loss(r, target) of one reward, the forms in use in the field
LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "maximize": lambda r, target: -r,
    "distance": lambda r, target: (target - r).abs(),
    "hinge": lambda r, target: (target - r).clamp(min=0),
}


@dataclass(frozen=True)
class WeightedReward:
    """Attributes:
    loss: ``maximize`` (-r), ``distance`` (|target - r|) or ``hinge`` (max(0, target - r)).
    """

    name: str
    reward: Reward
    weight: float
    loss: str = "maximize"
    target: float = 0.0

    def loss_of(self, scores: Tensor) -> Tensor:
        return self.weight * LOSSES[self.loss](scores, self.target)


@dataclass(frozen=True)
class RewardObjective:
    """Loss per sample ``Σ weight · loss(reward)`` of the decoded images, each image on its own.

    Attributes:
        decode: in place of the model's own decoder.
    """

    family: Family
    rewards: list[WeightedReward]
    prompts: list[str]
    decode: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x_N: Tensor, rows: Tensor) -> Scored:
        images = (self.decode or self.family.decode)(x_N)
        prompts = [self.prompts[row] for row in rows.tolist()]
        losses = images.new_zeros(len(images))
        seen: dict[str, Tensor] = {}
        for item in self.rewards:
            scores = scores_of(item.reward, item.name, images, prompts)
            losses = losses + item.loss_of(scores[item.name])
            seen |= scores
        return Scored(losses, {name: score.detach() for name, score in seen.items()})


def scores_of(reward: Reward, name: str, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """The score ``[B]`` under ``name``, and those of the parts of a mixture under ``name/part``."""
    if not hasattr(reward, "parts"):
        return {name: reward.score(images, prompts).float()}
    parts = reward.parts(images, prompts)
    return {name: reward.mixed(parts).float()} | {f"{name}/{part}": value for part, value in parts.items()}  # type: ignore[attr-defined]
