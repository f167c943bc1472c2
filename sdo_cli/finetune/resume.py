"""Going on with a run folder: what it was, whether it still is, and what is cut off after its last checkpoint."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdo_cli.errors import RecipeFault
from sdo_cli.files import read_json, write_text
from sdo_cli.finetune import checkpoint
from sdo_cli.finetune.checkpoint import Checkpoint
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource

# budget and logging: everything else would make it another run
MAY_CHANGE = (
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "output_dir",
    "description",
    "validation.grid_steps",
)


def identity(loaded: LoadedRecipe) -> dict[str, Any]:
    """What a run is, by dotted key; prompts by their words, wherever they lie."""
    tree = asdict(loaded.recipe)
    tree["prompts"] = _digest(loaded.prompts(loaded.recipe.prompts))
    held_out = loaded.recipe.validation.prompts
    tree["validation"]["prompts"] = _digest(loaded.prompts(held_out)) if held_out != PromptSource() else None
    return {key: value for key, value in _flat(tree, "") if key not in MAY_CHANGE}


def _digest(prompts: list[str]) -> str:
    return f"{len(prompts)} prompts, {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]}"


def _flat(tree: dict[str, Any], place: str) -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and value and key != "options"
        found += _flat(value, f"{place}{key}.") if inner else [(place + key, value)]
    return found


def find(loaded: LoadedRecipe, folder: Path, reporter: Reporter) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder; damaged ones are named and passed over.

    Raises:
        RecipeFault: the run was another one, key by key.
    """
    found, damaged = checkpoint.newest(folder)
    for sentence in damaged:
        reporter.note(f"passed over: {sentence}")
    if found is None:
        reporter.note(f"{folder}/ holds no checkpoint yet: from the beginning")
        return None
    now = json.loads(json.dumps(identity(loaded)))
    changed = [key for key in dict.fromkeys([*found.run, *now]) if found.run.get(key) != now.get(key)]
    if changed:
        lines = [f"{key}: {json.dumps(found.run.get(key))} there, {json.dumps(now.get(key))} here" for key in changed]
        allowed = ", ".join(MAY_CHANGE)
        raise RecipeFault([*lines, f"--resume {folder}: is another run; only {allowed} may change"])
    if found.step > loaded.recipe.max_train_steps:
        text = f"max_train_steps: {loaded.recipe.max_train_steps} is less than the {found.step} steps taken"
        raise RecipeFault([f"{text}; give more, or a new folder"])
    reporter.note(f"resumed from {found.folder} (step {found.step} of {loaded.recipe.max_train_steps})")
    return found


def is_finished(loaded: LoadedRecipe, folder: Path) -> bool:
    """Whether the folder holds this run with all its steps and results."""
    path = folder / "manifest.json"
    if not path.is_file() or read_json(path).get("status") != "finished":
        return False
    return steps_written(folder) >= loaded.recipe.max_train_steps


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def cut_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to ``step``: later ones, or one that was cut off, are written again; returns them."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def newest_unfinished(loaded: LoadedRecipe) -> Path | None:
    """The run folder of this recipe that was begun last and is not finished."""
    folders = [path for path in Path(loaded.recipe.output_dir).glob(f"{loaded.name}-*") if path.is_dir()]
    unfinished = [path for path in folders if not is_finished(loaded, path) and (path / "manifest.json").is_file()]
    return max(unfinished, key=lambda path: (path / "manifest.json").stat().st_mtime, default=None)
