"""FLOPs of every unit that a skip plan may leave out, and of a whole image under a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sdo_cli.device import dtype_of
from sdo_cli.estimate.cost import META, Split, count, count_parts
from sdo_cli.estimate.network import encoded
from sdo_cli.estimate.pipelines import plain_family
from sdo_cli.models.load import ModelSource, source_of
from sdo_cli.recipe.schema import Recipe
from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.skipping.supernet import wrapped


@dataclass(frozen=True)
class Flops:
    """Of one sample (a multiply-add is two); ``attention`` are the products of queries, keys and values among them,
    which MACs in papers leave out."""

    all: float
    attention: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.all + other.all, self.attention + other.attention)

    def __sub__(self, other: "Flops") -> "Flops":
        return Flops(self.all - other.all, self.attention - other.attention)

    def times(self, factor: float) -> "Flops":
        return Flops(factor * self.all, factor * self.attention)

    @property
    def published_macs(self) -> float:
        """Multiply-adds as papers count them, without attention's products."""
        return (self.all - self.attention) / 2


NOTHING = Flops(0.0, 0.0)


@dataclass(frozen=True)
class UnitFlops:
    """Of one branch of one network call for one sample.

    Attributes:
        units: by name, in the order in which they run.
        rest: everything else (embedding of time, first and last convolution); run whenever the network is called.
    """

    units: dict[str, Flops]
    rest: Flops

    @property
    def call(self) -> Flops:
        return sum(self.units.values(), self.rest)

    def shares(self, names: tuple[str, ...]) -> torch.Tensor:
        """``[units]`` float64: each one's share of what can be skipped."""
        flops = torch.tensor([self.units[name].all for name in names], dtype=torch.float64)
        return flops / flops.sum()

    def of_plan(self, plan: SkipPlan) -> Flops:
        """One branch of all network calls."""
        called = sum(not repeated for repeated in plan.repeats)
        per_unit = zip(plan.wiring.units, plan.runs.sum(0).tolist(), strict=True)
        return sum((self.units[name].times(count) for name, count in per_unit), self.rest.times(called))

    def of_calls(self, plan: SkipPlan) -> torch.Tensor:
        """``[calls]`` float64: the share of one whole call's FLOPs that each call computes."""
        units = torch.tensor([self.units[name].all for name in plan.wiring.units], dtype=torch.float64)
        called = torch.tensor([not repeated for repeated in plan.repeats])
        return (plan.runs.double() @ units + self.rest.all * called) / self.call.all

    def kept(self, plan: SkipPlan) -> float:
        """The share of the network's FLOPs that a plan computes, 0 … 1."""
        return float(self.of_calls(plan).mean())


@lru_cache(maxsize=8)
@torch.no_grad()
def unit_flops(source: ModelSource, grain: str, height: int | None = None, width: int | None = None) -> UnitFlops:
    """Counted on meta tensors, without weights.

    Raises:
        EnvironmentFault: the model's architecture is not known on this machine.
    """
    family = plain_family(source, dtype_of("no"))
    x = torch.empty(1, *family.latent_shape(height, width), device=META)
    t, condition = torch.empty(1, device=META, dtype=torch.long), encoded(source, "no", 1)

    def run(split: Split) -> torch.Tensor:
        def measured(unit: str, compute: Callable[[], Any], given: Any) -> Any:
            del given
            return split.measure(unit, compute)

        with wrapped(family.skippable(grain), measured):
            return family.network(x, t, condition)

    cost, parts = count_parts(run)
    units = {name: Flops(*pair) for name, pair in parts.items()}
    return UnitFlops(units, Flops(cost.flops, cost.attention) - sum(units.values(), NOTHING))


def call_shares(recipe: Recipe, plan: SkipPlan) -> torch.Tensor:
    """``[calls]``: the share of a whole network call that each call of a recipe's rollouts computes under a plan.

    Raises:
        EnvironmentFault: the model's architecture is not known on this machine.
    """
    return unit_flops(source_of(recipe), plan.grain, recipe.height, recipe.width).of_calls(plan)


@lru_cache(maxsize=8)
@torch.no_grad()
def decode_flops(source: ModelSource, height: int | None = None, width: int | None = None) -> float:
    """Of decoding one latent."""
    family = plain_family(source, dtype_of("no"))
    x = torch.empty(1, *family.latent_shape(height, width), device=META)
    return count(lambda: family.decode(x)).flops
