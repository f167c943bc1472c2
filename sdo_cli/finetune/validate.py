"""Held-out prompts, drawn with the same noise before, during and after training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.draw import DrawSettings, draw_images
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.models.base import Family
from sdo_cli.progress import Reporter
from sdo_cli.scoring.rewards import score_images
from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class Validation:
    """Attributes:
    prompts: held-out prompts, one entry each.
    seeds: images per prompt.
    rewards: by name; the trained ones and those that only measure.
        embed: conditions encoded before; None encodes them when they are drawn.
    """

    prompts: list[str]
    seeds: int
    run_seed: int
    rewards: dict[str, Reward]
    settings: DrawSettings
    batch_size: int
    embed: PromptEmbeddings | None = None

    @property
    def pairs(self) -> list[str]:
        """The prompt of every (prompt, seed) pair, prompts outermost."""
        return [prompt for prompt in self.prompts for _ in range(self.seeds)]

    def draw(self, family: Family, which: range, reporter: Reporter | None = None) -> Tensor:
        """Images ``[len(which), 3, H, W]`` of these pairs; pair i has the same noise whatever else is drawn."""
        prompts, parts = [self.pairs[i] for i in which], []

        def generator_for(j: int) -> torch.Generator:
            return keyed_generator(self.run_seed, "validation", sample=which[j])

        for images in draw_images(
            family, prompts, generator_for, self.settings, batch_size=self.batch_size, embed=self.embed
        ):
            parts.append(images)
            if reporter is not None:
                reporter.advance(len(images))
        return torch.cat(parts)

    def measure(self, family: Family, reporter: Reporter) -> dict[str, Tensor]:
        """Scores ``[prompts, seeds]`` by reward name."""
        images = self.draw(family, range(len(self.pairs)), reporter)
        return {
            name: score_images(reward, images.to(family.device), self.pairs).view(len(self.prompts), self.seeds)
            for name, reward in self.rewards.items()
        }
