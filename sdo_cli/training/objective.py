"""From final latents to the loss: decode, look, score, weigh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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


@dataclass(frozen=True)
class Looked:
    """What rewards say of R pictures or latents.

    Attributes:
        losses: by reward, weighted ``[R]``.
        scores: every score, of parts too.
        uncertainty: how far the weighted rewards may be off, each by its spread over views and among the parts of a
            mixture, added up ``[R]``; None where there is neither.
    """

    losses: dict[str, Tensor]
    scores: dict[str, Tensor]
    uncertainty: Tensor | None = None

    def beside(self, other: "Looked") -> "Looked":
        known = [one for one in (self.uncertainty, other.uncertainty) if one is not None]
        total = torch.stack(known).sum(0) if known else None
        return Looked(self.losses | other.losses, self.scores | other.scores, total)

    def scored(self, losses: Tensor) -> Scored:
        """With the losses as they were put together."""
        plain = {name: score.detach() for name, score in self.scores.items()}
        return Scored(losses, plain, None if self.uncertainty is None else self.uncertainty.detach())


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
            return self._put_together(images, lambda there: self._look(there, places))
        # no picture where nobody looks at one
        of_pictures = len(of_latents) < len(self.rewards)

        def both(there: Tensor) -> Looked:
            found = self._look_at(of_latents, there, places)
            if of_pictures:
                found = found.beside(self._look((self.decode or self.family.decode)(there), places))
            # in the recipe's order: rules that go by it see no difference
            return replace(found, losses={item.name: found.losses[item.name] for item in self.rewards})

        return self._put_together(x_N, both)

    def _put_together(self, at: Tensor, look: Callable[[Tensor], Looked]) -> Scored:
        """The sum of all losses; where gradients are looked at, those at the pictures, or at the latents if some reward
        sees these."""
        if torch.is_grad_enabled() and self.combine.looks and len(self.rewards) > 1:
            return self._each(at, look)
        found = look(at)
        return found.scored(sum(found.losses.values(), at.new_zeros(len(at))))

    def _look(self, images: Tensor, rows: list[int]) -> Looked:
        return self._look_at([item for item in self.rewards if not sees_latents(item.reward)], images, rows)

    def _look_at(self, items: list[WeightedReward], seen_by: Tensor, rows: list[int]) -> Looked:
        found = Looked({}, {})
        for item in items:
            scores, variance = self._seen(item, seen_by, rows)
            divided = self.spread(item.name)
            doubt = None if variance is None else abs(item.weight) / divided * variance.sqrt()
            found = found.beside(Looked({item.name: item.loss_of(scores[item.name], divided)}, scores, doubt))
        return found

    def _seen(self, item: WeightedReward, images: Tensor, rows: list[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Scores of what the reward sees, of several views the mean less ``lower_bound`` times their spread; and the
        variance of its own, over views and over the parts of a mixture."""
        prompts, look = [self.prompts[row] for row in rows], self.sight
        sight = Sight(look.crop, look.noise, look.jpeg)
        if not sight.alters or self.draw is None or sees_latents(item.reward):
            plain = scores_of(item.reward, item.name, images, prompts)
            return plain, among_parts(item, plain)
        views = [
            scores_of(item.reward, item.name, sight(images, self.draw, rows, view), prompts)
            for view in range(look.views)
        ]
        scores = {name: lower(torch.stack([view[name] for view in views]), look.lower_bound) for name in views[0]}
        variances = [found for view in views if (found := among_parts(item, view)) is not None]
        total = torch.stack(variances).mean(0) if variances else None
        if look.views > 1:
            over_views = torch.stack([view[item.name].detach() for view in views]).var(0, correction=0)
            total = over_views if total is None else total + over_views
        return scores, total

    def _each(self, at: Tensor, look: Callable[[Tensor], Looked]) -> Scored:
        """Every reward's gradient at the images, put together by the rule; decoded once, not once a reward. (At the
        latents, if some reward sees these: the decoder's graph is then gone back through once for each other reward.)

        The losses have the values they have, and the gradient that the rule made.
        """
        leaf = at.detach().requires_grad_()
        found = look(leaf)
        gradients = {}
        for name, loss in found.losses.items():
            (gradients[name],) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        self.looks.append({name: value.cpu() for name, value in looked_at(gradients).items()})
        stacked = torch.stack([g.flatten(1).float() for g in gradients.values()])
        g = CONFLICTS[self.combine.conflict](stacked).view_as(at).to(at.dtype)
        values = sum(found.losses.values(), at.new_zeros(len(at))).detach()
        along = (g * (at - at.detach())).flatten(1).sum(1)
        return found.scored(values + along)

    def _moved(self, images: Tensor, rows: list[int]) -> Tensor:
        """Where the loss grows most, ``sharpness`` away by root mean square (Foret et al. 2021, SAM, arXiv 2010.01412).

        The gradient is then taken there, as if the move were constant.
        """
        leaf = images.detach().requires_grad_()
        losses = self._look(leaf, rows).losses
        (g,) = torch.autograd.grad(sum(losses.values(), leaf.new_zeros(len(leaf))).sum(), leaf)
        size = g.flatten(1).float().square().mean(1).sqrt().clamp(min=1e-30).view(-1, 1, 1, 1)
        there = (leaf.detach() + self.sight.sharpness * (g / size).to(leaf.dtype)).clamp(0, 1)
        return images + (there - images).detach()


@torch.no_grad()
def among_parts(item: WeightedReward, scores: Mapping[str, Tensor]) -> Tensor | None:
    """The variance ``[R]`` that the parts of a mixture give its score; None of any other reward."""
    prefix = f"{item.name}/"
    parts = {name.removeprefix(prefix): score for name, score in scores.items() if name.startswith(prefix)}
    if len(parts) < 2 or not hasattr(item.reward, "variance"):
        return None
    found: Tensor = item.reward.variance(parts)
    return found


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
