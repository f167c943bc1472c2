"""The page of a run, from what its folder holds."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sdo_cli.files import is_held, read_json
from sdo_cli.prompt_sets.files import read_path
from sdo_cli.provenance import machine
from sdo_cli.records.check import OBJECTIVE, Check, checks_of, gain, quality, verdict
from sdo_cli.reports import content
from sdo_cli.runs.read import CHECKS, EVALUATED, METRICS, RECIPE, manifest_of
from sdo_cli.runs.summary import falls
from sdo_cli.scoring.statistics import FEWEST, Interval, Values, mean_interval, paired_gain, too_few, win_rate

SMOOTH = 10
# sentences on rewards, beside those on what fell
MOST_SAID = 4


def run_report(folder: Path, status: str | None = None) -> content.Report:
    """Curves, held-out gains and pictures of a run folder; of an unfinished one what there is.

    Args:
        status: what the manifest will say in a moment.
    """
    manifest = manifest_of(folder)
    recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    steps = _lines(folder / METRICS)
    held_out = read_json(folder / "validation.json") if (folder / "validation.json").exists() else None
    trained = list(steps[0]["rewards"]) if steps else []
    blocks: list[content.Chart | content.Forest | content.Table] = []
    if held_out:
        blocks += _gains(held_out, trained)
    checks = checks_of(_lines(folder / CHECKS))
    if len(checks) > 1:
        blocks.append(_over_optimisation(checks))
    evaluated = read_json(folder / EVALUATED)["measures"] if (folder / EVALUATED).exists() else {}
    blocks += [_curve(steps, name, held_out, evaluated.get(name)) for name in trained]
    blocks += [_by_checkpoint(name, rows) for name, rows in evaluated.items() if name not in trained]
    if len(checks) > 1:
        blocks += [_measure_curve(checks, name) for name in checks[0].values if name != OBJECTIVE]
    if steps:
        blocks.append(_optimizer(steps))
    status = status or manifest["status"]
    if status == "running" and not is_held(folder):
        status = "killed"
    said = "" if status == "finished" else f" ({status})"
    return content.Report(
        title=f"Run: {manifest['recipe']}{said}",
        subtitle=f"{len(steps)} steps of {recipe['model']} with the rule {recipe['gradient']['rule']} on "
        f"{', '.join(trained) or 'nothing yet'}",
        verdict=[*_verdict(held_out, trained), *_guard_verdict(checks, recipe)],
        blocks=blocks,
        gallery=_gallery(folder, held_out, recipe["validation"].get("base_guidance_scale")),
        settings=list(_settings(recipe)),
        machine=[*machine().items(), *manifest["versions"].items(), ("started", manifest["started"])],
        repeat=[manifest["command"], _again(folder, manifest)],
        pictures_first=True,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that is still written to."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _band(name: str, x: list[float], values: list[Values]) -> content.Series:
    """Means with their standard errors over prompts."""
    means = [float(v.mean()) for v in values]
    errors = [float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0 for v in values]
    low = [m - e for m, e in zip(means, errors, strict=True)]
    return content.Series(name, x, list(means), low=list(low), high=[m + e for m, e in zip(means, errors, strict=True)])


def _over_optimisation(checks: list[Check]) -> content.Chart:
    """What is trained against what is not, on the checks' own prompts."""
    x, first = [float(check.step) for check in checks], checks[0]
    series = [
        _band("trained", x, [gain(check, first, [OBJECTIVE]) for check in checks]),
        _band(f"not trained on ({', '.join(first.untrained)})", x, [quality(check, first) for check in checks]),
    ]
    note = (
        "Gain since the start in standard deviations over prompts, with standard errors. Where the second line falls "
    )
    note += "while the first rises, the reward is won at the pictures' cost."
    return content.Chart("Over-optimisation: trained against untrained rewards", "step", "gain", series, note=note)


def _measure_curve(checks: list[Check], name: str) -> content.Chart:
    x = [float(check.step) for check in checks]
    return content.Chart(f"Checks: {name}", "step", name, [_band(name, x, [check.of(name) for check in checks])])


def _guard_verdict(checks: list[Check], recipe: dict[str, Any]) -> list[str]:
    if len(checks) < 2:
        return []
    found, names = verdict(checks), ", ".join(checks[0].untrained)
    if (count := len(checks[0].of(OBJECTIVE))) < FEWEST and found.bad < recipe["guard"]["patience"]:
        return [f"The checks are of {count} prompt{'s' * (count != 1)}: too few to say which step was best."]
    at = next(check for check in checks if check.step == found.best)
    said = f"By the rewards not trained on ({names}) step {found.best} was the best of the trained steps"
    if quality(at, checks[0]).mean() <= 0:
        said += ", and not better than the model as it was"
    if found.bad >= recipe["guard"]["patience"]:
        trained = ", ".join(spec["name"] for spec in recipe["rewards"])
        return [f"Over-optimised: {found.sentence(trained)}.", f"{said}."]
    return [f"{said}."]


def _again(folder: Path, manifest: dict[str, Any]) -> str:
    """The command that runs it again from its folder, where the report was written: with its plug-ins."""
    here, place = Path.cwd().resolve(), folder.resolve() / RECIPE
    recipe = place.relative_to(here) if place.is_relative_to(here) else place
    # of installed packages there is nothing to give
    plugins = [plugin["path"] for plugin in manifest.get("plugins", ()) if not plugin.get("package")]
    return shlex.join(
        ["sdo", "finetune", "--recipe", str(recipe), *(w for path in plugins for w in ("--plugin", path))]
    )


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A row for every key that says something, spelled as it is overridden on the command line."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _settings(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _settings(inner, f"{name}.{number}")
    elif value not in (None, "", []):
        yield name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(held_out: dict[str, Any], when: str, name: str) -> Values:
    """Scores by prompt, seeds averaged."""
    return np.array(held_out[when][name], dtype=np.float64).mean(axis=1)


def _gain(held_out: dict[str, Any], name: str) -> Values:
    return _rows(held_out, "after", name) - _rows(held_out, "before", name)


def _gains(held_out: dict[str, Any], trained: list[str]) -> list[content.Chart | content.Forest | content.Table]:
    rows, intervals = [], []
    for name in held_out["before"]:
        found, won = mean_interval(_gain(held_out, name)), win_rate(_gain(held_out, name))
        role = "trained" if name in trained else "only measured"
        before, after = (_rows(held_out, when, name).mean() for when in ("before", "after"))
        rows.append([name, role, f"{before:.4f}", f"{after:.4f}", _signed(found), f"{100 * won.mean:.0f} %"])
        if found.low == found.low:
            span = content.Interval(found.mean, found.low, found.high)
            intervals.append(content.IntervalRow(name, span, _signed(found), role))
    count = len(held_out["prompts"])
    head = ["reward", "", "before", "after", "difference, 95 % interval", "higher on"]
    note = f"{count} prompts that were not trained on, the same noise before and after; seeds of a prompt are averaged."
    if "guided" in held_out:
        means = ", ".join(f"{name} {_rows(held_out, 'guided', name).mean():.4f}" for name in held_out["guided"])
        note += f" The untrained model with guidance: {means}."
    table = content.Table("Held-out prompts", head, rows, note=note)
    return [table, content.Forest("Gain on held-out prompts", "difference", intervals)] if intervals else [table]


def _signed(found: Interval) -> str:
    ends = [f"{v:+.4f}" if v == v else "–" for v in (found.mean, found.low, found.high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def _checkpoints(rows: list[list[float]]) -> content.Series:
    """Of an evaluation of several: step, mean and ends of its interval each."""
    step, mean, low, high = ([row[place] for row in rows] for place in range(4))
    return content.Series(
        "checkpoints, evaluated (95 % interval)", step, list(mean), low=list(low), high=list(high), points=True
    )


def _by_checkpoint(name: str, rows: list[list[float]]) -> content.Chart:
    note = "From the last `sdo eval` of this run's checkpoints, on its prompts."
    return content.Chart(f"{name}: by checkpoint", "step", name, [_checkpoints(rows)], note=note)


def _curve(
    steps: list[dict[str, Any]],
    name: str,
    held_out: dict[str, Any] | None,
    evaluated: list[list[float]] | None = None,
) -> content.Chart:
    """Batch means pale, their running mean with its standard error, the held-out mean before and after, and
    checkpoints that were evaluated."""
    last = float(steps[-1]["step"])
    # later updates on a rollout have its rewards, which are no measurements of their own
    steps = [step for step in steps if (step.get("replay") or {}).get("update", 1) == 1] or steps
    x = [float(step["step"]) for step in steps]
    values = np.array([step["rewards"][name] for step in steps], dtype=np.float64)
    windows = [values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values))]
    # skipped steps have no value
    windows = [w[np.isfinite(w)] for w in windows]
    means = [float(w.mean()) if len(w) else float("nan") for w in windows]
    errors = [float(w.std(ddof=1) / len(w) ** 0.5) if len(w) > 1 else 0.0 for w in windows]
    series = [
        content.Series("batch mean", x, list(values.tolist()), pale=True),
        content.Series(
            f"mean of the last {SMOOTH}",
            x,
            list(means),
            low=[m - e for m, e in zip(means, errors, strict=True)],
            high=[m + e for m, e in zip(means, errors, strict=True)],
        ),
    ]
    if held_out and name in held_out["before"]:
        ends = [mean_interval(_rows(held_out, when, name)) for when in ("before", "after")]
        series.append(
            content.Series(
                "held-out prompts (95 % interval)",
                [0.0, last],
                [e.mean for e in ends],
                low=[e.low for e in ends],
                high=[e.high for e in ends],
                points=True,
            )
        )
    if evaluated:
        series.append(_checkpoints(evaluated))
    note = "The band of the running mean is its standard error. Training prompts change from batch to batch."
    return content.Chart(f"{name}: trained and held out", "step", name, series, note=note)


def _optimizer(steps: list[dict[str, Any]]) -> content.Chart:
    x = [float(step["step"]) for step in steps]
    norm: list[float | None] = [step["grad_norm"] for step in steps]
    return content.Chart("Norm of the gradient", "step", "norm", [content.Series("norm", x, norm)])


def _verdict(held_out: dict[str, Any] | None, trained: list[str]) -> list[str]:
    """What fell, always; what the rewards did, of the first few, where there are prompts enough to say it."""
    if not held_out:
        return []
    gains = {
        name: paired_gain(*(torch.tensor(held_out[when][name]) for when in ("before", "after")))
        for name in held_out["before"]
    }
    lower = falls(gains, trained)
    if few := too_few(len(held_out["prompts"]), "held-out prompts"):
        return [*lower, few]
    sentences = []
    for name in (name for name in gains if not gains[name].fell):
        found = mean_interval(_gain(held_out, name))
        said = "rose" if found.low > 0 else "fell" if found.high < 0 else "did not change by more than chance"
        role = "trained" if name in trained else "not trained on"
        sentences.append(f"{name} ({role}) {said} on held-out prompts: {_signed(found)}.")
    return [*lower, *sentences[: max(0, MOST_SAID - len(lower))]]


def _held_out_prompts(folder: Path) -> list[str]:
    """Of a run that has not got to its last scores."""
    files = (folder / f"heldout_prompts.{kind}" for kind in ("txt", "jsonl"))
    return [prompt.text for prompt in read_path(next(path for path in files if path.is_file()))]


def _gallery(folder: Path, held_out: dict[str, Any] | None, scale: float | None) -> content.Gallery | None:
    """The grid prompts at every step that was drawn; scores are those of the first and last.

    Args:
        scale: of the guidance that the untrained model was drawn with too.
    """
    stages = sorted(path for path in (folder / "samples").glob("step_*") if any(path.glob("[0-9]*.png")))
    if not stages:
        return None
    numbers = [int(re.sub(r"\D", "", stage.name)) for stage in stages]
    columns = ["before" if number == 0 else f"step {number}" for number in numbers]
    last = len(columns) - 1
    guided = folder / "samples" / "guided"
    if any(guided.glob("[0-9]*.png")):
        stages.append(guided)
        columns.append(f"before, guidance {scale:g}" if scale is not None else "before, with guidance")
    prompts = held_out["prompts"] if held_out else _held_out_prompts(folder)
    names = sorted({path.name for stage in stages for path in stage.glob("[0-9]*.png")})
    cases = []
    for name in names:
        index = int(Path(name).stem)
        images = [stage / name if (stage / name).exists() else None for stage in stages]
        scores = {}
        if held_out and last:
            for reward in held_out["before"]:
                row: list[float | None] = [None] * len(stages)
                # the pictures show the first seed
                whens = {"before": 0, "after": last} | ({"guided": last + 1} if "guided" in held_out else {})
                for when, column in whens.items():
                    if column < len(row) and reward in held_out[when]:
                        row[column] = float(held_out[when][reward][index][0])
                scores[reward] = row
        cases.append(content.Case(f"{index:05d}", prompts[index], "", images, scores))
    measures = list(held_out["before"]) if held_out and last else []
    title = "Held-out pictures, same noise"
    return content.Gallery(columns, measures, cases, title=title, row=True, right=last)
