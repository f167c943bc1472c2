"""From final latents to the loss: decode, look, score, weigh."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.gradients.outcome import Scored
from sdo_cli.models.base import Family
from sdo_cli.recipe.schema import CombineSpec, SightSpec
from sdo_cli.scoring.latents import sees_latents
from sdo_cli.training.conflict import CONFLICTS, looked_at
from sdo_cli.training.sight import Draw, Sight

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

    def loss_of(self, scores: Tensor, spread: float = 1.0) -> Tensor:
        return self.weight / spread * LOSSES[self.loss](scores, self.target)


def _undivided(name: str) -> float:
    del name
    return 1.0


@dataclass(frozen=True)
class RewardObjective:
    """Loss per sample ``Σ weight · loss(reward)`` of the decoded images, each image on its own.

    Attributes:
        decode: in place of the model's own decoder.
        combine, sight: how rewards are put together, and what they see.
        spread: of a reward by its name, what its loss is divided by.
        draw: of the views; needed where there are any.
        looks: lengths and cosines of each reward's gradient at the images, filled as they are made.
    """

    family: Family
    rewards: list[WeightedReward]
    prompts: list[str]
    decode: Callable[[Tensor], Tensor] | None = None
    combine: CombineSpec = field(default_factory=CombineSpec)
    sight: SightSpec = field(default_factory=SightSpec)
    spread: Callable[[str], float] = _undivided
    draw: Draw | None = None
    looks: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, x_N: Tensor, rows: Tensor) -> Scored:
        of_latents = [item for item in self.rewards if sees_latents(item.reward)]
        places, grad = rows.tolist(), torch.is_grad_enabled()
        if not of_latents:
            images = (self.decode or self.family.decode)(x_N)
            if grad and self.sight.sharpness:
                images = self._moved(images, places)
            return self._put_together(images, places, lambda there: self._losses(there, places))
        # no picture where nobody looks at one
        of_pictures = len(of_latents) < len(self.rewards)

        def both(there: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            losses, seen = self._losses_of(of_latents, there, places)
            if of_pictures:
                others = self._losses((self.decode or self.family.decode)(there), places)
                losses, seen = losses | others[0], seen | others[1]
            # in the recipe's order: rules that go by it see no difference
            return {item.name: losses[item.name] for item in self.rewards}, seen

        return self._put_together(x_N, places, both)

    def _put_together(
        self, at: Tensor, rows: list[int], losses_at: Callable[[Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]
    ) -> Scored:
        """The sum of all losses; where gradients are looked at, those at the pictures, or at the latents if some reward
        sees these."""
        if torch.is_grad_enabled() and self.combine.looks and len(self.rewards) > 1:
            return self._each(at, losses_at)
        losses, seen = losses_at(at)
        return self._scored(sum(losses.values(), at.new_zeros(len(at))), seen)

    @staticmethod
    def _scored(losses: Tensor, seen: dict[str, Tensor]) -> Scored:
        return Scored(losses, {name: score.detach() for name, score in seen.items()})

    def _losses(self, images: Tensor, rows: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By reward, weighted ``[R]``; and every score, of parts too."""
        return self._losses_of([item for item in self.rewards if not sees_latents(item.reward)], images, rows)

    def _losses_of(
        self, items: list[WeightedReward], seen_by: Tensor, rows: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, seen = {}, dict[str, Tensor]()
        for item in items:
            scores = self._seen(item, seen_by, rows)
            losses[item.name] = item.loss_of(scores[item.name], self.spread(item.name))
            seen |= scores
        return losses, seen

    def _seen(self, item: WeightedReward, images: Tensor, rows: list[int]) -> dict[str, Tensor]:
        """Scores of what the reward sees: of several views the mean less ``lower_bound`` times their spread."""
        prompts, look = [self.prompts[row] for row in rows], self.sight
        sight = Sight(look.crop, look.noise, look.jpeg)
        if not sight.alters or self.draw is None or sees_latents(item.reward):
            return scores_of(item.reward, item.name, images, prompts)
        views = [
            scores_of(item.reward, item.name, sight(images, self.draw, rows, view), prompts)
            for view in range(look.views)
        ]
        return {name: lower(torch.stack([view[name] for view in views]), look.lower_bound) for name in views[0]}

    def _each(self, at: Tensor, losses_at: Callable[[Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Scored:
        """Every reward's gradient at the images, put together by the rule; decoded once, not once a reward. (At the
        latents, if some reward sees these: the decoder's graph is then gone back through once for each other reward.)

        The losses have the values they have, and the gradient that the rule made.
        """
        leaf = at.detach().requires_grad_()
        losses, seen = losses_at(leaf)
        gradients = {}
        for name, loss in losses.items():
            (gradients[name],) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        self.looks.append({name: value.cpu() for name, value in looked_at(gradients).items()})
        stacked = torch.stack([g.flatten(1).float() for g in gradients.values()])
        g = CONFLICTS[self.combine.conflict](stacked).view_as(at).to(at.dtype)
        values = sum(losses.values(), at.new_zeros(len(at))).detach()
        along = (g * (at - at.detach())).flatten(1).sum(1)
        return self._scored(values + along, seen)

    def _moved(self, images: Tensor, rows: list[int]) -> Tensor:
        """Where the loss grows most, ``sharpness`` away by root mean square (Foret et al. 2021, SAM, arXiv 2010.01412).

        The gradient is then taken there, as if the move were constant.
        """
        leaf = images.detach().requires_grad_()
        losses, _ = self._losses(leaf, rows)
        (g,) = torch.autograd.grad(sum(losses.values(), leaf.new_zeros(len(leaf))).sum(), leaf)
        size = g.flatten(1).float().square().mean(1).sqrt().clamp(min=1e-30).view(-1, 1, 1, 1)
        there = (leaf.detach() + self.sight.sharpness * (g / size).to(leaf.dtype)).clamp(0, 1)
        return images + (there - images).detach()


def lower(scores_VR: Tensor, factor: float) -> Tensor:
    """Mean less ``factor`` times the spread of V views ``[R]``; it is the biased one, and has a gradient at 0 too."""
    mean = scores_VR.mean(0)
    if not factor or len(scores_VR) < 2:
        return mean
    return mean - factor * (scores_VR.var(0, correction=0) + 1e-12).sqrt()


def scores_of(reward: Reward, name: str, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """The score ``[B]`` under ``name``, and those of the parts of a mixture under ``name/part``."""
    if not hasattr(reward, "parts"):
        return {name: reward.score(images, prompts).float()}
    parts = reward.parts(images, prompts)
    return {name: reward.mixed(parts).float()} | {f"{name}/{part}": value for part, value in parts.items()}  # type: ignore[attr-defined]
