"""Finished runs against the first of them, by the held-out scores they keep: nothing is drawn."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdo_cli.errors import RecipeFault
from sdo_cli.files import read_json
from sdo_cli.installed import sdo
from sdo_cli.runs.again import SAMPLING
from sdo_cli.runs.read import RECIPE
from sdo_cli.runs.table import differences, run_row, said_of
from sdo_cli.scoring.statistics import mean_interval, win_rate

# other pictures would be compared than those of two trainings
DRAWN_BY = ("model", *SAMPLING)
# scores of the untrained model that are alike so far are of the same noise
ALIKE = 1e-5


def draw_line(folders: Sequence[Path]) -> str:
    """What to type to draw them side by side, on prompts of one's own."""
    words = [word for folder in folders for word in ("--lora", str(folder))]
    return sdo("eval", "--prompts", "MINE.txt", *words)


def compare_runs(folders: Sequence[Path], *, anyway: bool) -> dict[str, Any]:
    """Differences of what the trained models scored on held-out prompts, to the first run.

    Args:
        anyway: also where they were drawn in other ways.

    Raises:
        RecipeFault: a run without held-out scores, other prompts, no reward that all have, or other ways of drawing.
    """
    there = draw_line(folders)
    if pending := [folder for folder in folders if not (folder / "validation.json").is_file()]:
        lines = [f"{folder}: has no held-out scores (yet); draw them side by side: {there}" for folder in pending]
        raise RecipeFault(lines, what="command line")
    scores = [read_json(folder / "validation.json") for folder in folders]
    others = [f for f, tree in zip(folders, scores, strict=True) if tree["prompts"] != scores[0]["prompts"]]
    if others:
        raise RecipeFault(
            [f"{f}: was measured on other prompts than {folders[0]}; draw them side by side: {there}" for f in others],
            what="command line",
        )
    recipes = [yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")) for folder in folders]
    differs = [
        f"{folder}: {key} {recipe[key]}, {recipes[0][key]} in {folders[0]}"
        for folder, recipe in zip(folders, recipes, strict=True)
        for key in DRAWN_BY
        if recipe.get(key) != recipes[0].get(key)
    ]
    if differs and not anyway:
        lines = [f"{line}; --anyway compares all the same, or draw alike: {there}" for line in differs]
        raise RecipeFault(lines, what="command line")
    names = [name for name in scores[0]["after"] if all(name in tree["after"] for tree in scores)]
    if not names:
        raise RecipeFault([f"the runs have no reward in common; measure one: {there}"], what="command line")
    return {
        "baseline": str(folders[0]),
        "differences_of_settings": differs,
        "prompts": len(scores[0]["prompts"]),
        "results": {
            str(folder): {name: _row(scores[0], tree, name) for name in names}
            | {"same_noise": _same_noise(scores[0], tree)}
            for folder, tree in zip(folders[1:], scores[1:], strict=True)
        },
        "differ_in": _differ_in(folders),
        "draw": there,
    }


def _differ_in(folders: Sequence[Path]) -> list[str]:
    """``learning_rate: 0.001, 0.002``, in the order of the runs."""
    found = differences([run_row(folder) for folder in folders])
    return [f"{key}: {', '.join(said_of(values[key]) for values in found)}" for key in found[0]]


def _means(tree: dict[str, Any], when: str, name: str) -> Any:
    return np.asarray(tree[when][name], dtype=np.float64).mean(axis=1)


def _row(first: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    d = _means(other, "after", name) - _means(first, "after", name)
    means = {"first": float(_means(first, "after", name).mean()), "mean": float(_means(other, "after", name).mean())}
    return {**means, "difference": asdict(mean_interval(d)), "win_rate": asdict(win_rate(d))}


def _same_noise(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the untrained model drew the same pictures for both."""
    shared = [name for name in first["before"] if name in other["before"]]
    rows = [(np.asarray(first["before"][name]), np.asarray(other["before"][name])) for name in shared]
    return bool(rows) and all(a.shape == b.shape and float(np.abs(a - b).max()) < ALIKE for a, b in rows)
