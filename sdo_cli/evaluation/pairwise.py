"""Diversity and distance by a network that sees two pictures at a time (LPIPS), prompt by prompt."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import TrainingFault
from sdo_cli.evaluation.evaluation import Evaluation, distance_to
from sdo_cli.evaluation.job import Item, pairs_by_seed
from sdo_cli.evaluation.score import Score, ScoreFile, running_mean
from sdo_cli.progress import Reporter
from sdo_cli.scoring.measure_names import diversity_by
from sdo_cli.scoring.perceptual import Backbone, build, distance


def measure_pairs(
    evaluation: Evaluation,
    backbones: Mapping[str, Backbone],
    reporter: Reporter,
    tick: Callable[[], None],
    device: torch.device,
) -> None:
    """What is not measured yet, each prompt's lines as soon as they are known.

    Args:
        backbones: of what was asked for this time, by kind.
        tick: called after every prompt.
    """
    scores = ScoreFile(evaluation.folder / "scores.jsonl")
    for kind, backbone in backbones.items():
        network = build(backbone, device)
        reporter.phase(kind, sum(len(_by_prompt(items)) for items in evaluation.items.values()))
        unlike = sum(
            _measure_variant(evaluation, variant.name, kind, network, scores, reporter, tick, device)
            for variant in evaluation.job.variants
        )
        if unlike:
            reporter.note(f"{kind}: {unlike} pair{'s' * (unlike != 1)} of pictures of two sizes left out")


def _measure_variant(
    evaluation: Evaluation,
    name: str,
    kind: str,
    network: nn.Module,
    scores: ScoreFile,
    reporter: Reporter,
    tick: Callable[[], None],
    device: torch.device,
) -> int:
    """Returns how many pairs there were of pictures of different sizes."""
    job, items = evaluation.job, evaluation.items[name]
    first, folders = job.variants[0], {v.name: evaluation.images(v) for v in job.variants}
    base_items = {(item.prompt, item.seed_index): item for item in evaluation.items[first.name]}
    pairs = {} if name == first.name else pairs_by_seed(evaluation.items[first.name], items)
    diversity, to_base, unlike = diversity_by(kind), distance_to(kind, first.name), 0

    def between(a: Tensor, b: Tensor, what: str) -> float | None:
        value = distance(network, a, b)
        if value is not None and not np.isfinite(value):
            raise TrainingFault(f"{what} is not finite", remedy="look at the pictures, and at --lpips-weights")
        return value

    for prompt, some in _by_prompt(items).items():
        held = [item for item in some if (item.prompt, item.seed_index) in pairs]
        spread = len(some) > 1 and not scores.has(name, diversity, prompt, None)
        held = [item for item in held if not scores.has(name, to_base, prompt, item.seed_index)]
        images = {item.file: _read(folders[name], item, device) for item in (some if spread else held)}
        lines: list[Score] = []
        for item in held:
            base = _read(folders[first.name], base_items[pairs[item.prompt, item.seed_index]], device)
            value = between(images[item.file], base, f"{to_base} of {name}/{item.file}")
            unlike += value is None
            if value is not None:
                lines.append(Score(name, to_base, prompt, item.seed_index, item.file, value))
        if spread:
            found = [
                between(images[a.file], images[b.file], f"{diversity} of {name}/{a.file} and {b.file}")
                for a, b in combinations(some, 2)
            ]
            alike = [value for value in found if value is not None]
            unlike += len(found) - len(alike)
            if alike:
                lines.append(Score(name, diversity, prompt, None, None, sum(alike) / len(alike)))
        scores.add(lines)
        reporter.advance(1, running_mean(scores, name, diversity if len(some) > 1 else to_base))
        tick()
    return unlike


def _by_prompt(items: list[Item]) -> dict[int, list[Item]]:
    found: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        found[item.prompt].append(item)
    return found


def _read(folder: Path, item: Item, device: torch.device) -> Tensor:
    return read_image(folder / item.file).to(device)
