"""What each sample of the global batch starts from. Every draw is keyed by (seed, purpose, step, sample)."""

from dataclasses import dataclass

import torch

from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class PromptOrder:
    """Every prompt once per epoch, in an order of its own each time."""

    prompts: list[str]
    seed: int

    def at(self, position: int) -> str:
        """The prompt of the ``position``-th sample of the run, counted over all steps."""
        epoch, place = divmod(position, len(self.prompts))
        return self.prompts[int(self._epoch(epoch)[place])]

    def first(self, count: int) -> list[str]:
        """The prompts of the first ``count`` samples, each once."""
        if count >= len(self.prompts):
            return self.prompts
        return [self.prompts[place] for place in self._epoch(0)[:count].tolist()]

    def _epoch(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.prompts), generator=keyed_generator(self.seed, "prompt-order", epoch))
