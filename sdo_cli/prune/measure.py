"""Speed and quality of plans and of samplers with as much computation, on the same prompts and noise."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.draw import DrawSettings, draw_images, make_route
from sdo_cli.drawing.pruned import skips_of, with_plan
from sdo_cli.progress import Reporter
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.ssim import ssim
from sdo_cli.scoring.rewards import score_images
from sdo_cli.scoring.statistics import Interval, Values, mean_interval
from sdo_cli.skipping.skip_plan import SkipPlan

FULL, SSIM = "full", "ssim"


@dataclass(frozen=True)
class Arm:
    """One way to draw: other settings, a plan, or both. ``ratio`` is the share of computation it was asked to save."""

    name: str
    settings: DrawSettings
    plan: SkipPlan | None = None
    ratio: float = 0.0

    def drawn_with(self) -> DrawSettings:
        return self.settings if self.plan is None else with_plan(self.settings, self.plan)


@dataclass(frozen=True)
class ArmMeasures:
    """Attributes:
    calls: of the network, whole or in part.
    kept: share of the full sampler's FLOPs in the network.
    flops: of one image: the network with both branches of guidance, attention's products, and the decoder.
    speed_up: measured, per round: seconds of the full sampler over this one's, decoding included.
    values: by measure, one per prompt; ``ssim`` is similarity to the full sampler's image.
    """

    arm: Arm
    calls: int
    kept: float
    flops: float
    speed_up: list[float]
    values: dict[str, Values]

    def difference(self, full: "ArmMeasures", measure: str) -> Interval:
        """Paired, over prompts."""
        return mean_interval(self.values[measure] - full.values[measure])


@torch.no_grad()
def measure(
    setting: Setting,
    arms: list[Arm],
    prompts: list[str],
    rewards: Mapping[str, Reward],
    *,
    reporter: Reporter,
    seed: int = 0,
    batch_size: int = 32,
    rounds: int = 3,
) -> Iterator[ArmMeasures]:
    """Each arm on all prompts, the full sampler first; image j starts from ``manual_seed(seed + j)``.

    Times are taken apart, all arms in turn in every round, so that they share whatever else the machine does.
    """
    arms = [Arm(FULL, setting.settings), *arms]
    speed_ups = timed(setting, arms, prompts, reporter=reporter, batch_size=batch_size, rounds=rounds)
    reference: Tensor | None = None
    for arm, speed_up in zip(arms, speed_ups, strict=True):
        reporter.phase(f"images: {arm.name}", len(prompts))
        images = torch.cat(list(_drawn(setting, arm, prompts, seed, batch_size, reporter)))
        reference = images if reference is None else reference
        values = {SSIM: _numbers(torch.cat(list(map(ssim, images.split(64), reference.split(64)))))}
        for name, reward in rewards.items():
            device = setting.family.device
            scores = [
                score_images(reward, part.to(device), prompts[i * 64 : i * 64 + 64]) for i, part in _parts(images)
            ]
            values[name] = _numbers(torch.cat(scores))
        kept = kept_of(setting, arm)
        yield ArmMeasures(arm, calls_of(setting, arm), kept, setting.image_flops(kept), speed_up, values)


def _parts(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    return iter(enumerate(images.split(64)))


def _numbers(values: Tensor) -> Values:
    return values.double().cpu().numpy()


def _drawn(
    setting: Setting, arm: Arm, prompts: list[str], seed: int, batch_size: int, reporter: Reporter | None = None
) -> Iterator[Tensor]:
    settings = arm.drawn_with()
    skips = None if arm.plan is None else skips_of(arm.plan, setting.family, settings)

    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed + j)

    parts = draw_images(
        setting.family, prompts, generator_for, settings, batch_size=batch_size, embed=setting.embed, skips=skips
    )
    for images in parts:
        if reporter is not None:
            reporter.advance(len(images))
        yield images


def timed(
    setting: Setting, arms: list[Arm], prompts: list[str], *, reporter: Reporter, batch_size: int, rounds: int
) -> list[list[float]]:
    """Per arm and round, how many times faster than the first arm; after a round that is not counted."""
    some = (prompts * batch_size)[:batch_size]
    reporter.phase("times", (rounds + 1) * len(arms))
    seconds = []
    for _ in range(rounds + 1):
        seconds.append([_seconds(setting, arm, some, batch_size) for arm in arms])
        reporter.advance(len(arms))
    return [[row[0] / row[k] for row in seconds[1:]] for k in range(len(arms))]


def _seconds(setting: Setting, arm: Arm, prompts: list[str], batch_size: int) -> float:
    start = time.perf_counter()
    for _ in _drawn(setting, arm, prompts, 0, batch_size):
        pass
    if setting.family.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def calls_of(setting: Setting, arm: Arm) -> int:
    if arm.plan is not None:
        return sum(not repeated for repeated in arm.plan.repeats)
    return make_route(setting.family, arm.settings).calls


def kept_of(setting: Setting, arm: Arm) -> float:
    """The share of the full sampler's FLOPs in the network."""
    whole = setting.calls * setting.flops.call.all
    if arm.plan is not None:
        return setting.flops.of_plan(arm.plan).all / whole
    return calls_of(setting, arm) * setting.flops.call.all / whole


def median(values: list[float]) -> float:
    return float(np.median(values))
