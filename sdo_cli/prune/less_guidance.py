"""Samplers of few calls at the guidance that brings them nearest to the full one.

A step that is ten times as long goes ten times as far along the guided direction: at the full sampler's scale few calls
are over-guided, and a control that is not allowed less says nothing of how its steps are placed.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.drawing.draw import branches
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.prune.measure import Arm
from sdo_cli.prune.setting import Setting
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.seeding import key_to_seed

# of the scale
MULTIPLES = (0.85, 0.7, 0.55, 0.4)
# samples that are compared
SAMPLES = 8


def at_their_guidance(setting: Setting, arms: list[Arm], world: World = SINGLE) -> list[Arm]:
    """Each once more with the multiple of its guidance, if less is better, whose latents are nearest to the full
    sampler's on prompts of the search; none without guidance."""
    if branches(setting.family, setting.settings) == 1:
        return []

    def found() -> list[float]:
        prompts = setting.prompts_of(0, min(SAMPLES, len(setting.prompts)))
        seeds = [key_to_seed(setting.seed, "prune-guidance", j) for j in range(len(prompts))]
        target = sample_latents(setting.path(prompts, seeds))
        return [nearest(setting, arm, prompts, seeds, target) for arm in arms]

    chosen = zip(arms, world.share(found), strict=True)
    return [_at(arm, multiple) for arm, multiple in chosen if multiple != 1.0]


@torch.no_grad()
def nearest(setting: Setting, arm: Arm, prompts: list[str], seeds: list[int], target: Tensor) -> float:
    """The multiple of the scale at which an arm ends nearest to ``target``, latents ``[B, …]``; 1 is among them."""

    def distance(multiple: float) -> float:
        one = _at(arm, multiple)
        path = replace(setting, settings=one.settings).path(prompts, seeds, plan=one.plan)
        return float((sample_latents(path) - target).double().square().mean())

    return min((1.0, *MULTIPLES), key=distance)


def _at(arm: Arm, multiple: float) -> Arm:
    scale = round(multiple * arm.settings.guidance_scale, 3)
    # at 1 there would be no guidance, which is another sampler
    settings = replace(arm.settings, guidance_scale=max(scale, 1.001))
    return replace(arm, name=f"{arm.name} guidance {scale:g}", settings=settings)
