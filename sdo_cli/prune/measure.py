"""Speed and quality of plans and of samplers with as much computation, on the same prompts and noise."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.draw import DrawSettings, draw_images, make_route
from sdo_cli.drawing.pruned import skips_of, with_plan
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.ssim import ssim
from sdo_cli.runs.kept import Kept
from sdo_cli.scoring.rewards import score_images
from sdo_cli.scoring.statistics import Interval, Values, mean_interval
from sdo_cli.skipping.skip_plan import SkipPlan

FULL, SSIM, TIMES = "full", "ssim", "times"


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
    kept: Kept | None = None,
    world: World = SINGLE,
) -> Iterator[ArmMeasures]:
    """Each arm on all prompts, the full sampler first; image j starts from ``manual_seed(seed + j)``.

    Times are taken apart, by the first process while the others wait, all arms in turn in every round, so that they
    share whatever else the machine does. Pictures are drawn and scored in batches that are dealt out.

    Args:
        kept: where times are put after every round and figures after every arm, and looked for first.
    """
    arms = [Arm(FULL, setting.settings), *arms]
    speed_ups = timed(
        setting, arms, prompts, reporter=reporter, batch_size=batch_size, rounds=rounds, kept=kept, world=world
    )
    gallery = _Gallery(setting, prompts, seed, batch_size, arms[0])
    for number, (arm, speed_up) in enumerate(zip(arms, speed_ups, strict=True)):
        values = _kept(kept, f"arm-{number:03d}", world)
        if values is None:
            values = _measured(gallery, arm, rewards, reporter, world)
            if kept is not None and world.is_main:
                kept.put(f"arm-{number:03d}", values)
        share = kept_of(setting, arm)
        numbers = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
        yield ArmMeasures(arm, calls_of(setting, arm), share, setting.image_flops(share), speed_up, numbers)


def _kept(kept: Kept | None, name: str, world: World) -> Any:
    """What the first process finds, for all of them."""
    return None if kept is None else world.share(lambda: kept.get(name))


@dataclass
class _Gallery:
    """The pictures of a measurement, in batches by number; the full sampler's stay with the process that drew them."""

    setting: Setting
    prompts: list[str]
    seed: int
    batch_size: int
    full: Arm
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def batches(self) -> list[range]:
        firsts = range(0, len(self.prompts), self.batch_size)
        return [range(first, min(first + self.batch_size, len(self.prompts))) for first in firsts]

    def reference(self, number: int) -> Tensor:
        """The full sampler's; drawn again in a measurement that goes on."""
        if number not in self.drawn:
            self.drawn[number] = self.pictures(self.full, number)
        return self.drawn[number]

    def pictures(self, arm: Arm, number: int) -> Tensor:
        which = self.batches()[number]
        prompts = [self.prompts[j] for j in which]
        return torch.cat(list(_drawn(self.setting, arm, prompts, self.seed + which.start, self.batch_size)))


def _measured(
    gallery: _Gallery, arm: Arm, rewards: Mapping[str, Reward], reporter: Reporter, world: World
) -> dict[str, list[float]]:
    """By measure a number for every prompt."""
    reporter.phase(f"images: {arm.name}", len(gallery.prompts))
    batches, mine = gallery.batches(), dict[int, dict[str, list[float]]]()
    device = gallery.setting.family.device
    for round_ in world.rounds(len(batches)):
        for number in filter(world.mine, round_):
            full = gallery.reference(number)
            images = full if arm is gallery.full else gallery.pictures(arm, number)
            prompts = [gallery.prompts[j] for j in batches[number]]
            mine[number] = {SSIM: ssim(images, full).double().tolist()}
            for name, reward in rewards.items():
                mine[number][name] = score_images(reward, images.to(device), prompts).double().tolist()
        reporter.advance(sum(len(batches[number]) for number in round_))
    every = {number: found for theirs in world.gather(mine) for number, found in theirs.items()}
    return {name: [value for number in sorted(every) for value in every[number][name]] for name in every[0]}


def _drawn(setting: Setting, arm: Arm, prompts: list[str], seed: int, batch_size: int) -> Iterator[Tensor]:
    settings = arm.drawn_with()
    skips = None if arm.plan is None else skips_of(arm.plan, setting.family, settings)

    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed + j)

    return draw_images(
        setting.family, prompts, generator_for, settings, batch_size=batch_size, embed=setting.embed, skips=skips
    )


def timed(
    setting: Setting,
    arms: list[Arm],
    prompts: list[str],
    *,
    reporter: Reporter,
    batch_size: int,
    rounds: int,
    kept: Kept | None = None,
    world: World = SINGLE,
) -> list[list[float]]:
    """Per arm and round, how many times faster than the first arm; after a round that is not counted."""
    some = (prompts * batch_size)[:batch_size]
    seconds: list[list[float]] = _kept(kept, TIMES, world) or []
    left = rounds - len(seconds)
    if left > 0:
        reporter.phase("times", (left + 1) * len(arms))
    for number in range(left + 1 if left > 0 else 0):
        row = []
        for arm in arms:
            row.append(_seconds(setting, arm, some, batch_size) if world.is_main else 0.0)
            # where the others wait
            reporter.advance()
        # also of a measurement that goes on: the first of a process is slower
        if number == 0:
            continue
        seconds.append(world.share(partial(list, row)))
        if kept is not None and world.is_main:
            kept.put(TIMES, seconds)
    return [[row[0] / row[k] for row in seconds] for k in range(len(arms))]


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
