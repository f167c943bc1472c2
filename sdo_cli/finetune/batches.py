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
        order = torch.randperm(len(self.prompts), generator=keyed_generator(self.seed, "prompt-order", epoch))
        return self.prompts[int(order[place])]
