"""What each sample of the global batch starts from. Every draw is keyed by (seed, purpose, step, sample)."""

from dataclasses import dataclass

import torch

from sdo_cli.models.base import Family
from sdo_cli.sampling.guidance import Condition
from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class PromptOrder:
    """Every prompt once per epoch, in an order of its own each time."""

    prompts: list[str]
    seed: int

    def at(self, position: int) -> str:
        """The prompt of the ``position``-th sample of the run, counted over all steps."""
        epoch, place = divmod(position, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=keyed_generator(self.seed, "prompt-order", epoch))
        return self.prompts[int(order[place])]


class PromptEmbeddings:
    """Conditions of prompts, computed once each and kept."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._kept: dict[str, Condition] = {}

    def __call__(self, prompts: list[str]) -> Condition:
        """``[B, …]`` for each entry of the condition."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if missing:
            fresh = self.family.encode(missing)
            for row, prompt in enumerate(missing):
                self._kept[prompt] = {key: value[row] for key, value in fresh.items()}
        keys = self._kept[prompts[0]].keys()
        return {key: torch.stack([self._kept[prompt][key] for prompt in prompts]) for key in keys}
