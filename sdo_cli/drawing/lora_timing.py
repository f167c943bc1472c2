"""A LoRA that is not there all the way: the base draws the early steps, or the LoRA's weight moves from step to step.

What a picture shows is settled early and its details late, so a LoRA that has learned to please a reward can be kept
out of the early steps, or faded in and out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.base import Family
from sdo_cli.models.lora_carried import weighted_dora
from sdo_cli.models.lora_files import find_lora
from sdo_cli.models.lora_read import has_text_layers
from sdo_cli.models.lora_stack import stack_of
from sdo_cli.sampling.guidance import Condition


@dataclass(frozen=True)
class LoraTiming:
    """Attributes:
    from_step: steps before it are the base model's.
    start, end: its weight at that step and at the last one, linear between.
    """

    from_step: int = 0
    start: float = 1.0
    end: float = 1.0

    @property
    def loaded(self) -> float:
        """The weight to load it with, of which others are a share."""
        return self.start or self.end

    def shares(self, steps: int, calls: int) -> list[float]:
        """Of ``loaded``, per network call; 0 is the base model. Calls that PNDM makes beside its steps come first."""
        first = self.from_step + (calls - steps if self.from_step else 0)
        last = max(calls - 1 - first, 1)
        weights = [self.start + (self.end - self.start) * (i - first) / last for i in range(first, calls)]
        return [0.0] * min(first, calls) + [weight / self.loaded if self.loaded else 0.0 for weight in weights]


class TimedNetwork:
    """The family's network for one way through the steps, called once a network call; no gradient."""

    def __init__(self, family: Family, shares: list[float]) -> None:
        self.family, self._shares = family, iter(shares)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        share = next(self._shares)
        if share == 0:
            return self.family.base_network(x, t, condition)
        with _weighted(self.family.denoiser, share):
            return self.family.network(x, t, condition)


def check_timed(family: Family, lora: str, timing: LoraTiming) -> None:
    """Raises EnvironmentFault for a LoRA that cannot change its weight between steps."""
    for one in stack_of(lora):
        if has_text_layers(find_lora(one.path)):
            raise EnvironmentFault(
                f"the LoRA {one.path} has layers for the text encoders, and prompts are encoded once, for all steps",
                remedy="leave --lora-from-step and --lora-scale-end out, or give one made for the denoiser alone",
            )
        if timing.start != timing.end and any(layer.lora_magnitude_vector for layer in _layers(family.denoiser)):
            raise weighted_dora(one.path, timing.end)


@contextmanager
def _weighted(denoiser: Any, share: float) -> Iterator[None]:
    layers = list(_layers(denoiser)) if share != 1 else []
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name in layer.scaling:
            layer.scaling[name] *= share
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def _layers(denoiser: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in denoiser.modules() if isinstance(module, LoraLayer))
