"""Runs side by side: how each stands, what it gained, and what sets its recipe apart. Imports no torch."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import rewards
from sdo_cli.errors import RecipeFault
from sdo_cli.files import is_held, read_json
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.records.check import checks_of, quality, verdict
from sdo_cli.reports import content
from sdo_cli.runs.read import CHECKS, METRICS, RECIPE, is_training, manifest_of, read_lines, recipe_of

# running, finished, interrupted and failed are the manifest's words
KILLED = "killed"
DIFFERS = "differs in"
RECENT = 20
# where a run lies, not what it is
NOT_COMPARED = (
    "description",
    "output_dir",
    "trackers",
    "report",
    "lora.kohya",
    "prompts",
    "validation.prompts",
    "guard.prompts",
)


@dataclass(frozen=True)
class RunGain:
    """On held-out prompts, seeds averaged: means, and the mean difference with its standard error over prompts."""

    before: float
    after: float
    difference: float
    standard_error: float

    @property
    def said(self) -> str:
        return f"{self.before:.4f} → {self.after:.4f} ({self.difference:+.4f} ± {self.standard_error:.4f})"


@dataclass(frozen=True)
class RunRow:
    """Attributes:
    status: of the manifest, or ``killed``: it says running, and no process holds the folder.
    steps, planned: taken, and of the recipe.
    trained: trained rewards, means of the last steps, of a run that has no held-out scores yet.
    gains: by reward.
    guard: what the checks say, empty without.
    seconds: of training.
    recipe: every key of it that is compared, dotted.
    """

    folder: Path
    name: str
    status: str
    steps: int
    planned: int
    gains: dict[str, RunGain]
    trained: dict[str, float]
    guard: str
    seconds: float
    started: str
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)


def runs_in(folder: Path) -> list[Path]:
    """Runs that lie in a folder, or one below, as sweeps have them; in the order they were begun."""
    found = {path.parent for pattern in (f"*/{RECIPE}", f"*/*/{RECIPE}") for path in folder.glob(pattern)}
    runs = [run for run in found if is_training(run)]
    return sorted(runs, key=lambda run: (manifest_of(run)["started"], str(run)))


def run_row(folder: Path) -> RunRow:
    """Raises RecipeFault for what is no run."""
    path = recipe_of(folder)
    if path is None:
        raise RecipeFault([f"{folder}: is no run: it holds no {RECIPE}"], what="command line")
    manifest, recipe = manifest_of(folder), yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = read_lines(folder / METRICS)
    status = manifest.get("status", "failed")
    if status == "running" and not is_held(folder):
        status = KILLED
    seconds = sum(sum(row["seconds"].values()) for row in steps)
    gains = held_out_gains(folder)
    recent = [row["rewards"] for row in steps[-RECENT:]]
    trained = {
        name: float(np.mean([row[name] for row in recent if row[name] is not None] or [np.nan]))
        for name in (recent[0] if recent and not gains else {})
    }
    return RunRow(
        folder=folder,
        name=manifest.get("recipe", folder.name),
        status=status,
        steps=len(steps),
        planned=recipe["max_train_steps"],
        gains=gains,
        trained=trained,
        guard=_guard_said(folder, recipe),
        seconds=seconds,
        started=manifest.get("started", ""),
        # a run of an older sdo had what was not there yet as it is by default
        recipe={key: value for key, value in {**_DEFAULTS, **dict(_flat(recipe, ""))}.items() if _is_compared(key)},
    )


def held_out_gains(folder: Path) -> dict[str, RunGain]:
    """Of a run that has come to its end; empty before, and without held-out prompts."""
    path = folder / "validation.json"
    if not path.is_file():
        return {}
    tree = read_json(path)
    return {name: _gain(tree["before"][name], tree["after"][name]) for name in tree["before"]}


def _gain(before: Any, after: Any) -> RunGain:
    first, last = (np.asarray(rows, dtype=np.float64).mean(axis=1) for rows in (before, after))
    d = last - first
    error = float(d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 else float("nan")
    return RunGain(float(first.mean()), float(last.mean()), float(d.mean()), error)


def _interval(folder: Path, name: str) -> tuple[float, float, float]:
    """As the run's own report has it."""
    from sdo_cli.scoring.statistics import mean_interval

    tree = read_json(folder / "validation.json")
    first, last = (np.asarray(tree[when][name], dtype=np.float64).mean(axis=1) for when in ("before", "after"))
    found = mean_interval(last - first)
    return found.mean, found.low, found.high


def _guard_said(folder: Path, recipe: dict[str, Any]) -> str:
    checks = checks_of(read_lines(folder / CHECKS))
    if len(checks) < 2:
        return ""
    found = verdict(checks)
    at = next(check for check in checks if check.step == found.best)
    best = f"best at {found.best}" if quality(at, checks[0]).mean() > 0 else "never better than at 0"
    return f"{best}, over-optimised" if found.bad >= recipe["guard"]["patience"] else best


def _flat(tree: dict[str, Any], place: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and key != "options":
            yield from _flat(value, f"{place}{key}.")
        else:
            yield place + key, value


def _is_compared(key: str) -> bool:
    return not key.startswith(NOT_COMPARED)


_DEFAULTS = dict(_flat(asdict(Recipe("", [], PromptSource())), ""))


def differences(rows: Sequence[RunRow]) -> list[dict[str, Any]]:
    """For each run its values of the keys that are not the same in all."""
    keys = list(dict.fromkeys(key for row in rows for key in row.recipe))
    differing = [key for key in keys if len({json.dumps(row.recipe.get(key), sort_keys=True) for row in rows}) > 1]
    return [{key: row.recipe.get(key) for key in differing} for row in rows]


def sorted_by(rows: Sequence[RunRow], reward: str) -> list[RunRow]:
    """Largest gain first, runs without one last.

    Raises:
        RecipeFault: no run has this reward, or it only measures: nothing is chosen by such.
    """
    known = list(dict.fromkeys(name for row in rows for name in row.gains))
    full = rewards.full_name(reward)
    name = next((n for n in known if n in (reward, full, rewards.TOYS.get(full)) or rewards.full_name(n) == full), None)
    if name is None:
        there = f"there are {', '.join(known)}" if known else "no run has held-out scores yet"
        raise RecipeFault([f"--sort: no run has the reward {reward}; {there}"], what="command line")
    if rewards.is_measure_only(rewards.full_name(name)) or "embedded:judge" in name:
        others = [n for n in known if not rewards.is_measure_only(rewards.full_name(n))]
        text = f"--sort: {name} only measures, nothing is chosen by it; take {' or '.join(others) or 'another'}"
        raise RecipeFault([text], what="command line")
    return sorted(
        rows, key=lambda row: (name not in row.gains, -row.gains[name].difference if name in row.gains else 0)
    )


def table_of(rows: Sequence[RunRow], named: Callable[[Path], str]) -> tuple[list[str], list[list[str]]]:
    """Head and cells for people; columns without anything are left out."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.gains, *row.trained)))
    head = ["run", "status", "steps", *names, "guard", "training", DIFFERS]
    differs = differences(rows)
    body = []
    for row, other in zip(rows, differs, strict=True):
        scores = [row.gains[name].said if name in row.gains else _now(row.trained.get(name)) for name in names]
        said = ", ".join(f"{key} {said_of(value)}" for key, value in other.items())
        progress = str(row.steps) if row.steps == row.planned else f"{row.steps} of {row.planned}"
        body.append([named(row.folder), row.status, progress, *scores, row.guard, f"{row.seconds:.0f} s", said])
    kept = [i for i in range(len(head)) if i < 3 or any(cells[i] for cells in body)]
    return [head[i] for i in kept], [[cells[i] for i in kept] for cells in body]


def _by_value(rows: Sequence[RunRow], named: Callable[[Path], str]) -> list[list[str]]:
    """A row for every value of a key that is not the same in all, with the runs that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for row, other in zip(rows, differences(rows), strict=True):
        for key, value in other.items():
            found.setdefault((key, said_of(value)), []).append(named(row.folder))
    order = list(dict.fromkeys(key for key, _ in found))
    return [
        [key, value, ", ".join(runs)]
        for (key, value), runs in sorted(found.items(), key=lambda x: order.index(x[0][0]))
    ]


def _now(value: float | None) -> str:
    return "" if value is None else f"now {value:.4f}"


def said_of(value: Any) -> str:
    """A value of a recipe for people."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "weight" in item for item in value):
        # rewards: names, with a weight where it is not 1, and what else is not plain
        return " + ".join(_reward_said(item) for item in value)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _reward_said(item: dict[str, Any]) -> str:
    weight = "" if item["weight"] == 1 else f"{item['weight']:g} × "
    loss = "" if item.get("loss", "maximize") == "maximize" else f" {item['loss']} {item['target']:g}"
    options = ", ".join(f"{key}={value}" for key, value in (item.get("options") or {}).items())
    return f"{weight}{item['name']}{loss}" + (f" ({options})" if options else "")


def runs_page(rows: Sequence[RunRow], title: str, named: Callable[[Path], str]) -> content.Report:
    """The table, and the gains as intervals, on one page."""
    head, body = table_of(rows, named)
    if head[-1] == DIFFERS:
        # a table of its own: it would run out of the page
        head, body = head[:-1], [cells[:-1] for cells in body]
    note = (
        "Before and after training on held-out prompts, with the mean difference and its standard error over prompts. "
        "Who picks a run by these prompts should state its gain on others."
    )
    blocks: list[content.Chart | content.Forest | content.Table] = [content.Table("Runs", head, body, note=note)]
    if apart := _by_value(rows, named):
        blocks.append(content.Table("What sets them apart", ["key of the recipe", "value", "runs"], apart))
    for name in dict.fromkeys(name for row in rows for name in row.gains):
        lines = []
        for row in rows:
            if (gain := row.gains.get(name)) is None:
                continue
            span = content.Interval(*_interval(row.folder, name))
            lines.append(content.IntervalRow(named(row.folder), span, gain.said))
        blocks.append(content.Forest(f"{name}: gain on held-out prompts", "difference, 95 % interval", lines))
    finished = sum(row.status == "finished" for row in rows)
    counted = f"{len(rows)} run{'s' * (len(rows) != 1)}, {finished} finished"
    return content.Report(title, counted, [], blocks)
