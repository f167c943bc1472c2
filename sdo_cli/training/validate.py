"""Prompts that are not trained on, drawn with the same noise before, during and after training, by all processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.draw import DrawSettings, draw_images
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.models.base import Family
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter, Silent
from sdo_cli.scoring.rewards import score_images
from sdo_cli.seeding import keyed_generator

T = TypeVar("T")


@dataclass(frozen=True)
class Validation:
    """Attributes:
    prompts: one entry each.
    seeds: images per prompt.
    rewards: by name; the trained ones and those that only measure.
    embed: conditions encoded before; None encodes them when they are drawn.
    purpose: of the noise; other purposes draw other noise.
    """

    prompts: list[str]
    seeds: int
    run_seed: int
    rewards: dict[str, Reward]
    settings: DrawSettings
    batch_size: int
    embed: PromptEmbeddings | None = None
    world: World = SINGLE
    purpose: str = "validation"

    @property
    def pairs(self) -> list[str]:
        """The prompt of every (prompt, seed) pair, prompts outermost."""
        return [prompt for prompt in self.prompts for _ in range(self.seeds)]

    def for_batches(
        self,
        family: Family,
        which: range,
        of: Callable[[Tensor, list[str]], T],
        reporter: Reporter | None = None,
    ) -> list[T]:
        """``of(images, prompts)`` for every batch of these pairs, in their order, on every process.

        Batches are a matter of index alone and dealt out in turn. Progress is told, and stopping safe, after each
        round, in which every process had its batch. Of a model in shards a process without one draws the last again,
        for the others' sake.
        """
        reporter, world, pairs = reporter or Silent(), self.world, self.pairs
        batches = [which[start : start + self.batch_size] for start in range(0, len(which), self.batch_size)]
        found: dict[int, T] = {}
        for round_ in world.rounds(len(batches)):
            for number in filter(world.mine, round_):
                prompts = [pairs[i] for i in batches[number]]
                found[number] = of(self._images(family, batches[number], prompts), prompts)
            if world.sharded and not any(map(world.mine, round_)):
                self._images(family, batches[-1], [pairs[i] for i in batches[-1]])
            reporter.advance(sum(len(batches[number]) for number in round_))
        every = {number: value for part in world.gather(found) for number, value in part.items()}
        return [every[number] for number in range(len(batches))]

    def _images(self, family: Family, which: range, prompts: list[str]) -> Tensor:
        def generator_for(j: int) -> torch.Generator:
            return keyed_generator(self.run_seed, self.purpose, sample=which[j])

        parts = draw_images(family, prompts, generator_for, self.settings, batch_size=len(prompts), embed=self.embed)
        return torch.cat(list(parts))

    def draw(self, family: Family, which: range, reporter: Reporter | None = None) -> Tensor:
        """Images ``[len(which), 3, H, W]`` of these pairs; pair i has the same noise whatever else is drawn."""
        return torch.cat(self.for_batches(family, which, lambda images, prompts: images, reporter))

    def scores(self, family: Family, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """By reward name ``[B]``, on the CPU."""
        there = images.to(family.device)
        return {name: score_images(reward, there, prompts) for name, reward in self.rewards.items()}

    def measure(self, family: Family, reporter: Reporter) -> dict[str, Tensor]:
        """Scores ``[prompts, seeds]`` by reward name."""
        found = self.for_batches(
            family, range(len(self.pairs)), lambda images, prompts: self.scores(family, images, prompts), reporter
        )
        return {name: self.table([part[name] for part in found]) for name in self.rewards}

    def table(self, parts: list[Tensor]) -> Tensor:
        """Values of every batch as ``[prompts, seeds, …]``."""
        every = torch.cat(parts)
        return every.view(len(self.prompts), self.seeds, *every.shape[1:])
