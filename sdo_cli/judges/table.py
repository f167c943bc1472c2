"""Scores made elsewhere: a CSV file with a row per picture, such as ``scores.csv`` with a column more."""

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdo_cli.errors import RecipeFault

# what sdo's own table has beside scores
PLACES = ("variant", "image", "prompt_index", "seed_index", "seed", "category", "prompt")


@dataclass(frozen=True)
class ScoreTable:
    """Attributes:
    scores: by measure and variant, a score for every picture by its file.
    left_out: columns that are measures of sdo's own.
    """

    scores: dict[str, dict[str, dict[str, float]]]
    left_out: list[str]


def read_scores(path: Path, images: Mapping[str, Collection[str]], own: Collection[str]) -> ScoreTable:
    """Read a table.

    Args:
        images: the files of every variant.
        own: measures that sdo takes itself: such columns are left out.

    Raises:
        RecipeFault: every kind of problem there is, each once, with its line.
    """
    wrong: list[str] = []
    header, rows = _rows(path)
    measures = [name for name in header if name and name not in PLACES and name not in own]
    if "image" not in header:
        wrong.append("has no column image with the pictures' names")
    if len(images) > 1 and "variant" not in header:
        wrong.append(f"has no column variant; the folder has {', '.join(images)}")
    if repeated := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        wrong.append(f"has two columns called {repeated[0]!r}")
    if not measures:
        wrong.append("has no column with scores; add one that is called like the judge")
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in measures}
    if not wrong:
        for number, row in rows:
            if problem := _take(row, images, scores, next(iter(images))):
                wrong.append(f"line {number}: {problem}")
                break
    if not wrong:
        wrong += _gaps(scores, images)
    if wrong:
        raise RecipeFault([f"--scores {path}: {text}" for text in wrong], what="command line")
    return ScoreTable(scores, [name for name in header if name in own])


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, dict(zip(header, row, strict=False))) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise RecipeFault([f"--scores {path}: cannot be read: {reason}"], what="command line") from fault
    return header, rows


def _take(
    row: Mapping[str, str],
    images: Mapping[str, Collection[str]],
    scores: dict[str, dict[str, dict[str, float]]],
    only: str,
) -> str:
    """Put a row's scores in their places; what is wrong with it, else nothing. An empty cell is no score."""
    variant, image = row.get("variant", only), row.get("image", "")
    if variant not in images:
        return f"there is no variant {variant!r}; there are {', '.join(images)}"
    if image not in images[variant]:
        return f"{variant} has no picture {image!r}"
    for measure, table in scores.items():
        text = row.get(measure, "").strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            return f"{measure} is {text!r}, which is no number"
        if not math.isfinite(value):
            return f"{measure} is {text}, which is not finite"
        if image in table.setdefault(variant, {}):
            return f"{variant}/{image} has a second {measure}"
        table[variant][image] = value
    return ""


def _gaps(scores: Mapping[str, Mapping[str, Mapping[str, float]]], images: Mapping[str, Collection[str]]) -> list[str]:
    """A variant is scored wholly or not at all: means over other pictures are of something else."""
    found = []
    for measure, tables in scores.items():
        if not tables:
            found.append(f"column {measure} is empty")
        for variant, table in tables.items():
            if left := [file for file in images[variant] if file not in table]:
                found.append(f"{measure} is missing for {len(left)} pictures of {variant}; the first is {left[0]}")
    return found
