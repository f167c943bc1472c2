"""Held-out prompts, drawn with the same noise before, during and after training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.draw import DrawSettings, draw_images
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
    """

    prompts: list[str]
    seeds: int
    run_seed: int
    rewards: dict[str, Reward]
    settings: DrawSettings
    batch_size: int

    def draw(self, family: Family, count: int, reporter: Reporter | None = None) -> Tensor:
        """Images of the first ``count`` (prompt, seed) pairs, prompts outermost, ``[count, 3, H, W]``."""
        pairs = [prompt for prompt in self.prompts for _ in range(self.seeds)][:count]
        parts = []
        for images in draw_images(family, pairs, self._generator, self.settings, batch_size=self.batch_size):
            parts.append(images)
            if reporter is not None:
                reporter.advance(len(images))
        return torch.cat(parts)

    def _generator(self, index: int) -> torch.Generator:
        return keyed_generator(self.run_seed, "validation", sample=index)

    def measure(self, family: Family, reporter: Reporter) -> dict[str, Tensor]:
        """Scores ``[prompts, seeds]`` by reward name."""
        count = len(self.prompts) * self.seeds
        images = self.draw(family, count, reporter)
        pairs = [prompt for prompt in self.prompts for _ in range(self.seeds)]
        return {
            name: score_images(reward, images.to(family.device), pairs).view(len(self.prompts), self.seeds)
            for name, reward in self.rewards.items()
        }
