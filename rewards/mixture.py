"""Several rewards as one, each normalised by frozen statistics, so that every image still stands on its own."""

from typing import Any

import torch
from torch import Tensor

import rewards
from rewards.base import Reward, RewardInfo
from sdo_cli.errors import RecipeFault

INFO = RewardInfo(
    name="mixture",
    summary="Σ weight · (score - mean) / std over its parts",
    source="of its parts",
    licence="of its parts",
    range=(-10.0, 10.0),
)


class Mixture:
    """Args:
    members: by name: reward, weight, mean, std.
    """

    info = INFO

    def __init__(self, members: dict[str, tuple[Reward, float, float, float]]) -> None:
        self.members = members

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Mixture":
        for reward in self._rewards():
            if hasattr(reward, "to"):
                reward.to(device, dtype)
        return self

    def gradient_checkpointing(self) -> None:
        for reward in self._rewards():
            if hasattr(reward, "gradient_checkpointing"):
                reward.gradient_checkpointing()

    def _rewards(self) -> list[Any]:
        return [member[0] for member in self.members.values()]

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        """Of the part that reads least."""
        found = [reward.unread(prompts) for reward in self._rewards() if hasattr(reward, "unread")]
        return min(found, key=lambda read: read[0], default=(0, []))

    def parts(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The plain score ``[B]`` of every part."""
        return {name: member[0].score(images, prompts) for name, member in self.members.items()}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.mixed(self.parts(images, prompts))

    def mixed(self, parts: dict[str, Tensor]) -> Tensor:
        """The mixture ``[B]`` of plain scores."""
        terms = []
        for name, (_, weight, mean, std) in self.members.items():
            terms.append(weight * (parts[name] - mean) / std)
        return torch.stack(terms).sum(0)


def build(parts: list[dict[str, Any]]) -> Mixture:
    """Args:
        parts: ``{name: …, weight: 1, mean: 0, std: 1, options: {}}`` each.

    Raises:
        RecipeFault: a part that only measures, or the same name twice: scores are told apart by it.
    """
    members: dict[str, tuple[Reward, float, float, float]] = {}
    for part in parts:
        reward = rewards.build(part["name"], part.get("options"))
        if not reward.info.trainable:
            raise RecipeFault([f"{part['name']} only measures and cannot be part of a mixture"], what="mixture")
        if part["name"] in members:
            raise RecipeFault([f"{part['name']} is a part twice; give it once"], what="mixture")
        members[part["name"]] = (reward, part.get("weight", 1.0), part.get("mean", 0.0), part.get("std", 1.0))
    return Mixture(members)
