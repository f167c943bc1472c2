"""From final latents to the loss: decode, score, weigh."""

from dataclasses import dataclass

from torch import Tensor

from rewards.base import Reward
from sdo_cli.gradients.outcome import Scored
from sdo_cli.models.base import Family


@dataclass(frozen=True)
class WeightedReward:
    name: str
    reward: Reward
    weight: float


@dataclass(frozen=True)
class RewardObjective:
    """Loss per sample ``- Σ weight · reward`` of the decoded images, each image on its own."""

    family: Family
    rewards: list[WeightedReward]
    prompts: list[str]

    def __call__(self, x_N: Tensor, rows: Tensor) -> Scored:
        images = self.family.decode(x_N)
        prompts = [self.prompts[row] for row in rows.tolist()]
        scores = {item.name: item.reward.score(images, prompts) for item in self.rewards}
        losses = -sum(item.weight * scores[item.name] for item in self.rewards)
        assert isinstance(losses, Tensor)
        return Scored(losses, {name: score.detach() for name, score in scores.items()})
