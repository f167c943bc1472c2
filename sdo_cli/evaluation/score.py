"""Scores of images on disk, one reward at a time, each appended to ``scores.jsonl`` as it is known."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards.base import Reward
from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import EnvironmentFault, TrainingFault
from sdo_cli.evaluation.job import Item, pairs_by_seed
from sdo_cli.files import write_atomic
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.scoring.embedded_measures import distances, diversity
from sdo_cli.scoring.measure_names import DISTANCE, DIVERSITY

# measured by embeddings, not by a reward
EMBEDDED_MEASURES = (DIVERSITY, DISTANCE)


@dataclass(frozen=True)
class Score:
    """A line of ``scores.jsonl``; ``seed`` is None for what is measured over all images of a prompt."""

    variant: str
    measure: str
    prompt: int
    seed: int | None
    image: str | None
    score: float


class ScoreFile:
    """Append-only; a line that was cut off by a kill is removed when the file is opened again.

    Every process of ``world`` knows all scores, the first one writes them.
    """

    def __init__(self, path: Path, world: World = SINGLE) -> None:
        self.path, self.world = path, world
        self._known: dict[tuple[str, str], dict[tuple[int, int | None], float]] = defaultdict(dict)
        if world.is_main and path.exists():
            self._read()
        self._known = world.share(lambda: self._known)

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                self._keep(Score(**json.loads(line)))
            except (ValueError, TypeError) as fault:
                raise EnvironmentFault(
                    f"{self.path}:{number}: is not a score", remedy="remove the file; images are scored again"
                ) from fault

    def _keep(self, score: Score) -> None:
        self._known[score.variant, score.measure][score.prompt, score.seed] = score.score

    def has(self, variant: str, measure: str, prompt: int, seed: int | None) -> bool:
        return (prompt, seed) in self._known[variant, measure]

    def add(self, scores: list[Score], *, anew: bool = False) -> None:
        """Append those that are not known yet, in one write.

        Args:
            anew: also those that are known by another value; a later line counts.
        """
        known = {s: self._known[s.variant, s.measure].get((s.prompt, s.seed)) for s in scores}
        fresh = [s for s in scores if known[s] is None or (anew and known[s] != s.score)]
        if not fresh:
            return
        if self.world.is_main:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(s.__dict__) + "\n" for s in fresh))
        for score in fresh:
            self._keep(score)

    def of(self, variant: str, measure: str) -> dict[tuple[int, int | None], float]:
        """By (prompt, seed)."""
        return dict(self._known[variant, measure])


def batches(items: list[Item], folder: Path, size: int, device: torch.device) -> Iterator[tuple[list[Item], Tensor]]:
    """Images of one size together, at most ``size``; which go together does not depend on what was scored before."""
    for start in range(0, len(items), size):
        by_shape: dict[torch.Size, list[tuple[Item, Tensor]]] = defaultdict(list)
        for item in items[start : start + size]:
            image = read_image(folder / item.file)
            by_shape[image.shape].append((item, image))
        for pairs in by_shape.values():
            yield [item for item, _ in pairs], torch.stack([image for _, image in pairs]).to(device)


@torch.no_grad()
def score_variant(
    name: str,
    reward: Reward,
    variant: str,
    items: list[Item],
    folder: Path,
    scores: ScoreFile,
    reporter: Reporter,
    *,
    device: torch.device,
    batch_size: int,
) -> None:
    """Score what is missing.

    Raises:
        TrainingFault: a score that is not finite.
    """
    parts, world = _parts(items, batch_size), scores.world
    for round_ in world.rounds(len(parts)):
        lines: list[Score] = []
        for part in (parts[k] for k in round_ if world.mine(k)):
            if all(scores.has(variant, name, item.prompt, item.seed_index) for item in part):
                continue
            for some, images in batches(part, folder, batch_size, device):
                found = reward.score(images, [item.text for item in some])
                lines += _lines(variant, name, some, found)
        scores.add([line for some_lines in world.gather(lines) for line in some_lines])
        reporter.advance(sum(len(parts[k]) for k in round_), running_mean(scores, variant, name))


def _parts(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _lines(variant: str, measure: str, items: list[Item], values: Tensor) -> list[Score]:
    lines = []
    for item, value in zip(items, values.double().tolist(), strict=True):
        if not np.isfinite(value):
            raise TrainingFault(
                f"{measure} of {variant}/{item.file} is not finite", remedy="look at the image; try reward precision no"
            )
        lines.append(Score(variant, measure, item.prompt, item.seed_index, item.file, value))
    return lines


def running_mean(scores: ScoreFile, variant: str, measure: str) -> str:
    values = list(scores.of(variant, measure).values())
    return f"{variant}: {sum(values) / len(values):.4f}" if values else ""


@torch.no_grad()
def embed_variant(
    name: str,
    clip: Any,
    variant: str,
    items: list[Item],
    folder: Path,
    kept: Path,
    scores: ScoreFile,
    reporter: Reporter,
    *,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """Unit-length embeddings ``[images, D]`` by the CLIP of the reward ``name``, and its score on the way.

    They are kept in the file ``kept``, under the names of the images.
    """
    files, world = [item.file for item in items], scores.world
    known = all(scores.has(variant, name, item.prompt, item.seed_index) for item in items)
    if known and (table := world.share(lambda: load_file(kept) if kept.exists() else {})).keys() >= set(files):
        reporter.advance(len(items), running_mean(scores, variant, name))
        return torch.stack([table[file] for file in files])
    found: dict[str, Tensor] = {}
    parts = _parts(items, batch_size)
    for round_ in world.rounds(len(parts)):
        lines: list[Score] = []
        fresh: dict[str, Tensor] = {}
        for part in (parts[k] for k in round_ if world.mine(k)):
            for some, images in batches(part, folder, batch_size, device):
                rows = clip.encoder.images(images)
                similarity = (rows * clip.encoder.prompts([item.text for item in some])).sum(-1)
                lines += _lines(variant, name, some, similarity)
                fresh |= {item.file: row for item, row in zip(some, rows.float().cpu(), strict=True)}
        for some_lines, some_rows in world.gather((lines, fresh)):
            scores.add(some_lines)
            found |= some_rows
        reporter.advance(sum(len(parts[k]) for k in round_), running_mean(scores, variant, name))
    if world.is_main:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, lambda path: save_file({file: row.contiguous() for file, row in found.items()}, path))
    return torch.stack([found[file] for file in files])


def diversity_lines(variant: str, items: list[Item], embeddings: Tensor) -> list[Score]:
    """Per prompt the mean of 1 - cos over all pairs of its images; none for a prompt with one image."""
    rows: dict[int, list[Tensor]] = defaultdict(list)
    for item, row in zip(items, embeddings, strict=True):
        rows[item.prompt].append(row)
    return [
        Score(variant, DIVERSITY, prompt, None, None, diversity(torch.stack(some)))
        for prompt, some in rows.items()
        if len(some) > 1
    ]


def distance_lines(
    variant: str, items: list[Item], embeddings: Tensor, base_items: list[Item], base: Tensor
) -> list[Score]:
    """Per image 1 - cos to the base's image of the same prompt and noise; none where there is no such image."""
    place = {(item.prompt, item.seed_index): row for item, row in zip(base_items, base, strict=True)}
    pairs, lines = pairs_by_seed(base_items, items), []
    for item, row in zip(items, embeddings, strict=True):
        if (at := pairs.get((item.prompt, item.seed_index))) is not None:
            value = distances(row, place[at]).item()
            lines.append(Score(variant, DISTANCE, item.prompt, item.seed_index, item.file, value))
    return lines
