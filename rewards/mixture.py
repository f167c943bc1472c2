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
    lower_bound: how much of the parts' spread is taken off.
    """

    info = INFO

    def __init__(self, members: dict[str, tuple[Reward, float, float, float]], lower_bound: float = 0.0) -> None:
        self.members, self.lower_bound = members, lower_bound

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
        """The mixture ``[B]`` of plain scores.

        With a lower bound κ it is W (m - κ s), W the sum of the weights, m and s weighted mean and spread of the parts'
        normalised scores: what one part alone likes is worth less (Coste et al. 2023, arXiv 2310.02743, on ensembles).
        """
        terms = []
        for name, (_, weight, mean, std) in self.members.items():
            terms.append(weight * (parts[name] - mean) / std)
        total = torch.stack(terms).sum(0)
        if not self.lower_bound:
            return total
        whole, variance = self._spread(torch.stack(terms))
        # its root has a gradient at 0 too
        return total - self.lower_bound * whole * (variance + 1e-12).sqrt()

    def variance(self, parts: dict[str, Tensor]) -> Tensor:
        """How far the parts are apart about one score ``[B]``, as a variance of the mixture's: (W s)²."""
        terms = [weight * (parts[name] - mean) / std for name, (_, weight, mean, std) in self.members.items()]
        whole, variance = self._spread(torch.stack(terms))
        return whole**2 * variance

    def _spread(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """The sum W of the weights' sizes, and s² of the parts' normalised scores, weighted terms ``[K, B]`` given."""
        sizes = [abs(member[1]) for member in self.members.values()]
        weights = torch.tensor(sizes, dtype=terms.dtype, device=terms.device)
        share = (weights / weights.sum()).unsqueeze(1)
        # one that counts for nothing has no share either
        z = terms / weights.clamp(min=torch.finfo(terms.dtype).tiny).unsqueeze(1)
        return weights.sum(), (share * (z - (share * z).sum(0)).square()).sum(0)


def build(parts: list[dict[str, Any]], lower_bound: float = 0.0) -> Mixture:
    """Args:
        parts: ``{name: …, weight: 1, mean: 0, std: 1, options: {}}`` each.
        lower_bound: how much of the parts' spread is taken off their mean, so that all have to like a picture; 0: none.
            Needs weights above 0.

    Raises:
        RecipeFault: a part that only measures, or the same name twice: scores are told apart by it; or a lower bound
            that is negative or has negative weights.
    """
    if not 0 <= lower_bound < float("inf"):
        raise RecipeFault([f"lower_bound must be a number from 0, not {lower_bound}"], what="mixture")
    if lower_bound and any(part.get("weight", 1.0) <= 0 for part in parts):
        raise RecipeFault(
            ["lower_bound needs weights above 0: of what counts against, no bound is low"], what="mixture"
        )
    members: dict[str, tuple[Reward, float, float, float]] = {}
    for part in parts:
        reward = rewards.build(part["name"], part.get("options"))
        if not reward.info.trainable:
            raise RecipeFault([f"{part['name']} only measures and cannot be part of a mixture"], what="mixture")
        if reward.info.sees == "latent":
            raise RecipeFault([f"{part['name']} sees latents; name it beside the mixture"], what="mixture")
        if part["name"] in members:
            raise RecipeFault([f"{part['name']} is a part twice; give it once"], what="mixture")
        members[part["name"]] = (reward, part.get("weight", 1.0), part.get("mean", 0.0), part.get("std", 1.0))
    return Mixture(members, lower_bound)
