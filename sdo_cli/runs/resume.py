"""Going on with a run folder: what it was, whether it still is, and what is cut off after its last checkpoint."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdo_cli.drawing.rollouts import rollout_plan
from sdo_cli.errors import RecipeFault
from sdo_cli.files import write_text
from sdo_cli.models.lora_files import lora_hash
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.recipe.toys import tree_with_toys_named
from sdo_cli.records.check import checks_of, verdict
from sdo_cli.runs import checkpoint
from sdo_cli.runs.checkpoint import Checkpoint
from sdo_cli.runs.folder import absolute_paths
from sdo_cli.runs.read import CHECKS, MANIFEST, is_training, manifest_of, read_lines, steps_written

# how a step's samples are dealt out; their number may not change
SPLIT = ("train_batch_size", "gradient_accumulation_steps")
# budget and logging: everything else would make it another run
MAY_CHANGE = (
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "output_dir",
    "description",
    "validation.grid_steps",
    "trackers",
    "report",
    "lora.kohya",
    "guard.patience",
    "guard.stop",
    *SPLIT,
)


def identity(loaded: LoadedRecipe, processes: int = 1) -> dict[str, Any]:
    """What a run is, by dotted key; prompts by their words, wherever they lie.

    How the samples of a step are dealt out is no part of it: a run may go on with more or fewer processes.
    """
    tree = asdict(loaded.recipe)
    tree["global_batch"] = loaded.recipe.global_batch(processes)
    guarded = loaded.recipe.guard.prompts
    tree["guard"]["prompts"] = digest_of(loaded.prompts(guarded)) if guarded != PromptSource() else None
    tree["prompts"] = digest_of(loaded.prompts(loaded.recipe.prompts))
    held_out = loaded.recipe.validation.prompts
    tree["validation"]["prompts"] = digest_of(loaded.prompts(held_out)) if held_out != PromptSource() else None
    plan = rollout_plan(loaded.recipe, loaded.folder)
    lora = loaded.recipe.rollout.lora
    if lora is not None:
        tree["rollout"]["lora"] = lora_hash(lora) or lora
    tree["rollout"]["skip_plan"] = plan.fingerprint if plan is not None else None
    # the same file, from wherever it is named
    absolute_paths(tree)
    return {key: value for key, value in flat(tree, "") if key not in MAY_CHANGE}


def _defaults() -> dict[str, Any]:
    """Keys of a recipe that have a default, as :func:`identity` writes them."""
    tree = asdict(Recipe("", [], PromptSource()))
    kept = {key: value for key, value in flat(tree, "") if key.split(".")[0] not in ("model", "rewards", "prompts")}
    return {key: value for key, value in kept.items() if key not in MAY_CHANGE and ".prompts." not in key}


def digest_of(prompts: list[str]) -> str:
    return f"{len(prompts)} prompts, {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]}"


def flat(tree: dict[str, Any], place: str) -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and value and key != "options"
        found += flat(value, f"{place}{key}.") if inner else [(place + key, value)]
    return found


def find(loaded: LoadedRecipe, folder: Path, reporter: Reporter, world: World = SINGLE) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder, the same on all processes; damaged ones are named, passed over.

    Raises:
        RecipeFault: the run was another one, key by key.
    """
    found, damaged = checkpoint.newest(folder) if world.is_main else (None, [])
    which = world.share(lambda: found.folder if found is not None else None)
    if which is not None and found is None:
        found = checkpoint.read(which)
    for sentence in damaged:
        reporter.note(f"passed over: {sentence}")
    if found is None:
        reporter.note(f"{folder}/ holds no checkpoint yet: from the beginning")
        return None
    for sentence in require_same(loaded, folder, found.run, world.size):
        reporter.note(sentence)
    if found.step > loaded.recipe.max_train_steps:
        text = f"max_train_steps: {loaded.recipe.max_train_steps} is less than the {found.step} steps taken"
        raise RecipeFault([f"{text}; give more, or a new folder"])
    reporter.note(f"resumed from {found.folder} (step {found.step} of {loaded.recipe.max_train_steps})")
    return found


def require_same(loaded: LoadedRecipe, folder: Path, run: dict[str, Any], processes: int) -> list[str]:
    """What lies elsewhere than it did, a sentence each.

    Raises:
        RecipeFault: the run was another one, key by key.
    """
    now = json.loads(json.dumps(identity(loaded, processes)))
    # a run of an older sdo had what was not there yet as it is by default, and no names of the toys
    there = tree_with_toys_named({**_defaults(), **run})
    changed = [key for key in dict.fromkeys([*there, *now]) if not _same(there.get(key), now.get(key))]
    moved = sorted(key for key in set(there) & set(now) if there[key] != now[key] and key not in changed)
    if changed:
        notes = {"global_batch": " (train_batch_size × gradient_accumulation_steps × processes)"}
        lines = [
            f"{key}: {json.dumps(there.get(key))} there, {json.dumps(now.get(key))} here{notes.get(key, '')}"
            for key in changed
        ]
        allowed = ", ".join(MAY_CHANGE)
        raise RecipeFault(lines, what=f"recipe: {folder} is another run, of which only {allowed} may change")
    return [f"{key}: {json.dumps(now[key])} in place of {json.dumps(there[key])}" for key in moved]


def _same(there: Any, here: Any) -> bool:
    """Equal, or files of one name whose old place is not on this machine, or was said from another folder.

    Weights that lie elsewhere are the user's word: nothing tells them from others of their name.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return set(there) == set(here) and all(_same(there[key], here[key]) for key in there)
    if isinstance(there, list) and isinstance(here, list):
        return len(there) == len(here) and all(map(_same, there, here))
    if there == here or not (isinstance(there, str) and isinstance(here, str) and "/" in there):
        return bool(there == here)
    old, new = Path(there).expanduser(), Path(here).expanduser()
    return old.name == new.name and new.exists() and (not old.exists() or old.resolve() == new.resolve())


def finished(loaded: LoadedRecipe, folder: Path, processes: int = 1) -> str:
    """How to go on with a folder that holds this run with all its steps and results; empty when it does not.

    Raises:
        RecipeFault: it holds another run.
    """
    tree = manifest_of(folder)
    if tree.get("status") != "finished":
        return ""
    kept, _ = checkpoint.newest(folder)
    if kept is not None and loaded.overrides:
        # what was asked for by hand is not what is there
        require_same(loaded, folder, kept.run, processes)
    if steps_written(folder) >= loaded.recipe.max_train_steps:
        return "more steps: max_train_steps=…"
    ended = loaded.recipe.guard.stop and tree.get("stopped_at") == steps_written(folder)
    if ended and verdict(checks_of(read_lines(folder / CHECKS))).bad >= loaded.recipe.guard.patience:
        return "its guard ended it; more steps all the same: guard.stop=false"
    return ""


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to ``step``: later ones, or one that was cut off, are written again; returns them."""
    rows = [row for row in read_lines(path) if row["step"] <= step]
    if path.is_file() or rows:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def newest_unfinished(loaded: LoadedRecipe) -> Path | None:
    """The run folder of this recipe that was begun last and is not finished."""
    runs = (path.parent for path in Path(loaded.recipe.output_dir).glob(f"*/{MANIFEST}"))
    mine = [run for run in runs if is_stopped(run) and manifest_of(run).get("recipe") == loaded.name]
    return max(mine, key=last_touched, default=None)


def newest_stopped(runs: Path) -> Path | None:
    """Of all runs in a folder the one that was worked on last and is not finished."""
    stopped = [path.parent for path in runs.glob(f"*/{MANIFEST}") if is_stopped(path.parent)]
    return max(stopped, key=last_touched, default=None)


def newest_run(runs: Path) -> Path | None:
    """Of all runs in a folder the one that was worked on last."""
    there = [path.parent for path in runs.glob(f"*/{MANIFEST}") if is_training(path.parent)]
    return max(there, key=last_touched, default=None)


def is_stopped(folder: Path) -> bool:
    """A run of `sdo finetune` that has not come to its end."""
    return is_training(folder) and manifest_of(folder).get("status") != "finished"


def last_touched(folder: Path) -> float:
    return (folder / MANIFEST).stat().st_mtime
