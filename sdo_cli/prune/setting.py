"""What every search works on: a model, how it draws, prompts; batches of noise and full samples."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sdo_cli.drawing.draw import DrawSettings, branches, draw_noise, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import made_for, skips_of, wiring_of, with_plan
from sdo_cli.estimate.units import UnitFlops, decode_flops, unit_flops
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource
from sdo_cli.prune.ratios import Budget
from sdo_cli.sampling.loop import Path
from sdo_cli.seeding import key_to_seed, keyed_generator
from sdo_cli.skipping.liveness import Wiring, live
from sdo_cli.skipping.skip_plan import MadeFor, SkipPlan


@dataclass(frozen=True)
class Setting:
    """Attributes:
    source: of the weights, for counting.
    prompts: the search's own; what it finds is measured on others.
    grain: ``blocks`` or ``parts``.
    seed: of the noise.
    """

    family: Family
    source: ModelSource
    embed: PromptEmbeddings
    settings: DrawSettings
    prompts: list[str]
    grain: str = "blocks"
    seed: int = 0

    @cached_property
    def wiring(self) -> Wiring:
        return wiring_of(self.family, self.grain, self.embed(self.prompts[:1]))

    @cached_property
    def flops(self) -> UnitFlops:
        return unit_flops(self.source, self.grain, self.settings.height, self.settings.width)

    @cached_property
    def shares(self) -> Tensor:
        return self.flops.shares(self.wiring.units)

    @cached_property
    def budget(self) -> Budget:
        units = torch.tensor([self.flops.units[name].all for name in self.wiring.units], dtype=torch.float64)
        call = self.flops.call.all
        return Budget(units / call, self.flops.rest.all / call, self.wiring.inputs_reach_output)

    def image_flops(self, kept: float) -> float:
        """Of one image when the network computes this share of the full sampler: both branches, and the decoder."""
        decoder = decode_flops(self.source, self.settings.height, self.settings.width)
        return kept * branches(self.family, self.settings) * self.calls * self.flops.call.all + decoder

    @cached_property
    def calls(self) -> int:
        return make_route(self.family, self.settings).calls

    @property
    def made_for(self) -> MadeFor:
        return made_for(self.family, self.settings)

    def plan(self, runs: Tensor, **made_by: object) -> SkipPlan:
        """The plan that computes ``runs [calls, units]``."""
        made_by = {"guidance_scale": self.settings.guidance_scale, **made_by}
        return SkipPlan(self.made_for, self.grain, self.wiring, live(runs, self.wiring), made_by)

    def prompts_of(self, update: int, batch: int) -> list[str]:
        """The prompts of one update: each comes up once before any comes again."""
        count = len(self.prompts)
        found = []
        for j in range(update * batch, (update + 1) * batch):
            order = torch.randperm(count, generator=keyed_generator(self.seed, "prune-prompts", j // count))
            found.append(self.prompts[int(order[j % count])])
        return found

    def path(self, prompts: list[str], seeds: list[int], *, plan: SkipPlan | None = None) -> Path:
        """From the noise of ``seeds`` to the latents of ``prompts``.

        Args:
            plan: what is left out; its own steps, where it has some.
        """
        settings = self.settings if plan is None else with_plan(self.settings, plan)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = draw_noise(self.family, settings, generators)
        condition, negative = encode_pair(self.embed, settings, prompts)
        skips = None if plan is None else skips_of(plan, self.family, settings)
        return make_path(self.family, settings, noise, condition, negative, skips=skips)

    def update_path(self, update: int, batch: int, sample: int = 0) -> Path:
        """Fresh noise for one of the prompts of an update."""
        seed = key_to_seed(self.seed, "prune-noise", update, sample)
        return self.path([self.prompts_of(update, batch)[sample]], [seed])
