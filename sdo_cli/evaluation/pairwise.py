"""Diversity and distance by a network that sees two pictures at a time (LPIPS), prompt by prompt."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import TrainingFault
from sdo_cli.evaluation.evaluation import Evaluation, distance_to
from sdo_cli.evaluation.job import Item, Place, Variant, pairs_by_seed
from sdo_cli.evaluation.score import Score, ScoreFile, running_mean
from sdo_cli.progress import Reporter
from sdo_cli.scoring.measure_names import diversity_by
from sdo_cli.scoring.perceptual import Backbone, build, distance


@dataclass
class Pairs:
    """Pairs of pictures before one network.

    Attributes:
        unlike: how many were of two sizes, and were not measured.
    """

    network: nn.Module
    device: torch.device
    unlike: int = 0
    _read: dict[Path, Tensor] = field(default_factory=dict)

    def apart(self, a: Path, b: Path) -> float | None:
        """Raises TrainingFault for what is not finite."""
        value = distance(self.network, self._image(a), self._image(b))
        self.unlike += value is None
        if value is not None and not np.isfinite(value):
            raise TrainingFault(f"LPIPS of {a} and {b} is not finite", remedy="look at the pictures and the weights")
        return value

    def _image(self, path: Path) -> Tensor:
        if path not in self._read:
            self._read[path] = read_image(path).to(self.device)
        return self._read[path]

    def forget(self) -> None:
        """The pictures read so far: those of another prompt follow."""
        self._read.clear()


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
    scores, first = ScoreFile(evaluation.folder / "scores.jsonl"), evaluation.job.baseline
    for kind, backbone in backbones.items():
        pairs = Pairs(build(backbone, device), device)
        diversity, to_base = diversity_by(kind), distance_to(kind, first)
        reporter.phase(kind, sum(len(_by_prompt(items)) for items in evaluation.items.values()))
        for variant in evaluation.job.variants:
            partners, folder = _partners(evaluation, variant), evaluation.images(variant)
            for some in _by_prompt(evaluation.items[variant.name]).values():
                lines = _spread(variant.name, diversity, some, folder, pairs, scores)
                scores.add(lines + _distances(variant.name, to_base, some, folder, partners, pairs, scores))
                pairs.forget()
                reporter.advance(1, running_mean(scores, variant.name, to_base if partners else diversity))
                tick()
        if pairs.unlike:
            reporter.note(f"{kind}: {pairs.unlike} pair{'s' * (pairs.unlike != 1)} of pictures of two sizes left out")


def _partners(evaluation: Evaluation, variant: Variant) -> dict[Place, Path]:
    """For a variant's pictures, by place, the first variant's of the same prompt and noise; none for itself."""
    first = evaluation.job.variants[0]
    if variant.name == first.name:
        return {}
    base = {(item.prompt, item.seed_index): item.file for item in evaluation.items[first.name]}
    places = pairs_by_seed(evaluation.items[first.name], evaluation.items[variant.name])
    return {mine: evaluation.images(first) / base[theirs] for mine, theirs in places.items()}


def _spread(name: str, measure: str, items: list[Item], folder: Path, pairs: Pairs, scores: ScoreFile) -> list[Score]:
    """The mean over all pairs of one prompt's pictures, if it is not known."""
    prompt = items[0].prompt
    if len(items) < 2 or scores.has(name, measure, prompt, None):
        return []
    found = [pairs.apart(folder / a.file, folder / b.file) for a, b in combinations(items, 2)]
    alike = [value for value in found if value is not None]
    return [Score(name, measure, prompt, None, None, sum(alike) / len(alike))] if alike else []


def _distances(
    name: str,
    measure: str,
    items: list[Item],
    folder: Path,
    partners: Mapping[Place, Path],
    pairs: Pairs,
    scores: ScoreFile,
) -> list[Score]:
    """Of one prompt's pictures to their partners, where they are not known."""
    lines = []
    for item in items:
        at = partners.get((item.prompt, item.seed_index))
        if at is None or scores.has(name, measure, item.prompt, item.seed_index):
            continue
        if (value := pairs.apart(folder / item.file, at)) is not None:
            lines.append(Score(name, measure, item.prompt, item.seed_index, item.file, value))
    return lines


def _by_prompt(items: list[Item]) -> dict[int, list[Item]]:
    found: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        found[item.prompt].append(item)
    return found
