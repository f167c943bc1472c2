"""What lies in a run's folder, for all who read one: `sample`, `eval`, `export`, `report`, a resumed run. No torch."""

import json
from pathlib import Path
from typing import Any

from sdo_cli.files import read_json
from sdo_cli.models.catalog import LORA_FILE
from sdo_cli.models.lora_paths import RUN_MARK

# the recipe as it was given, and spelled out with its prompts beside it
MANIFEST, AS_GIVEN, RECIPE = "manifest.json", "recipe.yaml", RUN_MARK
# a line per step (sdo_cli.records.step), a line per check (sdo_cli.records.check)
METRICS, CHECKS = "metrics.jsonl", "guard.jsonl"
# what an evaluation of several checkpoints found
EVALUATED = "evaluated.json"
# of `train: full`
PIPELINE = "pipeline"


def is_run(folder: Path) -> bool:
    """Whether a run has begun its steps here."""
    return (folder / METRICS).is_file()


def is_training(folder: Path) -> bool:
    """Whether this is a run of `sdo finetune`: other commands' folders have recipes and manifests too."""
    return (folder / RECIPE).is_file() and "family" in manifest_of(folder)


def manifest_of(folder: Path) -> dict[str, Any]:
    """What ran here and how it ended; empty where nothing did, also for a path that is a file."""
    path = folder / MANIFEST
    tree: dict[str, Any] = read_json(path) if path.is_file() else {}
    return tree


def run_of(lora: str | Path) -> Path | None:
    """The run that a LoRA's file or folder belongs to, that of a checkpoint too; None for one of no run."""
    place = Path(lora).expanduser()
    if place.is_file() and place.name != LORA_FILE:
        return None
    if (place / MANIFEST).is_file() or (place / RECIPE).is_file():
        return place
    # as it was named, where that reaches so far
    for folder in (*list(place.parents)[:3], *list(place.absolute().parents)[:3]):
        if (folder / MANIFEST).is_file() and (folder / RECIPE).is_file():
            return folder
    return None


def recipe_of(folder: Path) -> Path | None:
    """The recipe that repeats the run, if this is one."""
    path = folder / RECIPE
    return path if path.is_file() else None


def pipeline_of(folder: Path) -> Path | None:
    """The model of a run that trained all weights; None for one that has a LoRA, or is not finished."""
    path = folder / PIPELINE
    return path if (path / "model_index.json").is_file() else None


def steps_written(folder: Path) -> int:
    path = folder / METRICS
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Up to one that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
