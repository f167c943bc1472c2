"""Evaluations side by side, paired by noise or else by prompt; nothing is drawn or scored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rewards
from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.evaluation import Evaluation
from sdo_cli.evaluation.job import Job, Prompts
from sdo_cli.evaluation.report import comparison_report
from sdo_cli.evaluation.summary import Comparison, Measured, comparisons, pairing_row
from sdo_cli.files import without_nan, write_json
from sdo_cli.provenance import command, versions
from sdo_cli.reports.page import write_report


@dataclass(frozen=True)
class Side:
    """One thing to compare and the evaluation it is part of."""

    job: Job
    measured: Measured
    origin: str


def open_sides(paths: list[Path]) -> list[Side]:
    """Each path an evaluation, which stands for all its variants, or the folder of one variant in it.

    Raises:
        RecipeFault: neither, no scores, or fewer than two things.
    """
    sides: list[Side] = []
    for path in paths:
        inside = not (path / "settings.json").is_file() and (path.parent / "settings.json").is_file()
        evaluation = Evaluation.open(path.parent if inside else path)
        measured = evaluation.measured()
        if inside:
            measured = [m for m in measured if m.name == path.name]
            if not measured:
                names = ", ".join(variant.name for variant in evaluation.job.variants)
                raise RecipeFault([f"{path}: is no part of its evaluation; there are {names}"], what="command line")
        if unscored := [m.name for m in measured if not m.scores]:
            raise RecipeFault(
                [f"{path}: {unscored[0]} has no scores yet; finish it with the same sdo eval"], what="command line"
            )
        sides += [Side(evaluation.job, m, str(path if inside else path / m.name)) for m in measured]
    if len(sides) < 2:
        raise RecipeFault(["two things are needed; name another evaluation"], what="command line")
    return _named(sides)


def _named(sides: list[Side]) -> list[Side]:
    """Names that tell them apart: with the evaluation's where variants are called the same."""
    names = [side.measured.name for side in sides]
    found = []
    for side, name in zip(sides, names, strict=True):
        shown = name if names.count(name) == 1 else f"{Path(side.origin).parent.name}/{name}"
        found.append(replace(side, measured=_renamed(side.measured, shown)))
    return found


def _renamed(measured: Measured, name: str) -> Measured:
    return replace(measured, variant=replace(measured.variant, name=name))


def differences(sides: list[Side]) -> list[str]:
    """What is not the same in the evaluations, each as a sentence; the model may differ, it is what is compared."""
    first, found = sides[0], []
    for side in sides[1:]:
        pair = f"{first.origin} and {side.origin}"
        if first.job.prompts.fingerprint != side.job.prompts.fingerprint:
            found.append(f"{pair}: other prompts ({first.job.prompts.name}, {side.job.prompts.name})")
        if first.job.settings is not None and side.job.settings is not None:
            for key, (a, b) in first.job.settings.differences(side.job.settings).items():
                if key != "prompts":
                    found.append(f"{pair}: {key} is {a!r} and {b!r}")
        elif (first.job.settings is None) != (side.job.settings is None):
            found.append(f"{pair}: one was not drawn by sdo, its noise and settings are not known")
        if first.job.reward_precision != side.job.reward_precision:
            found.append(f"{pair}: rewards in {first.job.reward_precision} and {side.job.reward_precision}")
        for name in first.job.rewards.keys() & side.job.rewards.keys():
            a, b = first.job.rewards[name].options, side.job.rewards[name].options
            if dict(a) != dict(b):
                found.append(f"{pair}: {name} with {dict(a)} and {dict(b)}")
            elif name in first.job.sources and name in side.job.sources:
                here, there = first.job.sources[name], side.job.sources[name]
                if here.get("code") != there.get("code"):
                    found.append(f"{pair}: {name} with other code of its plug-in")
                elif dict(here) != dict(there):
                    found.append(f"{pair}: {name} with other local files")
        for name in first.job.distances.keys() & side.job.distances.keys():
            if (by := first.job.distances[name]) != (other := side.job.distances[name]):
                found.append(f"{pair}: {name} by {by} and by {other}")
        for name in first.job.judges.keys() & side.job.judges.keys():
            a_judge, b_judge = first.job.judges[name], side.job.judges[name]
            for key in ("question", "version"):
                if (there := getattr(a_judge, key)) != (here := getattr(b_judge, key)):
                    found.append(f"{pair}: the {key} of judge {name} is {there!r} and {here!r}")
    return list(dict.fromkeys(found))


def common(sides: list[Side], *, by_text: bool) -> tuple[Prompts, list[Measured]]:
    """The sides over one list of prompts.

    Args:
        by_text: the prompts differ: pair those with the same words, in the first side's order.

    Raises:
        RecipeFault: no prompt in common.
    """
    prompts = sides[0].job.prompts
    if not by_text:
        return prompts, [side.measured for side in sides]
    place: dict[str, int] = {}
    for index, prompt in enumerate(prompts.prompts):
        place.setdefault(prompt.text, index)
    found = []
    for side in sides:
        new = {i: place[p.text] for i, p in reversed(list(enumerate(side.job.prompts.prompts))) if p.text in place}
        # of prompts that repeat, the first
        kept = {old: at for old, at in new.items() if min(o for o, a in new.items() if a == at) == old}
        found.append(_moved(side.measured, kept))
    shared = set.intersection(*({item.prompt for item in m.items} for m in found))
    if not shared:
        raise RecipeFault(["they have no prompt in common, so nothing is paired"], what="command line")
    return prompts, [_moved(m, {index: index for index in shared}) for m in found]


def _moved(measured: Measured, place: Mapping[int, int]) -> Measured:
    return replace(
        measured,
        items=[replace(item, prompt=place[item.prompt]) for item in measured.items if item.prompt in place],
        scores={
            name: {(place[prompt], seed): score for (prompt, seed), score in table.items() if prompt in place}
            for name, table in measured.scores.items()
        },
    )


def compare_folders(
    paths: list[Path], out: Path, *, anyway: bool = False, select_by: str | None = None, report: bool = True
) -> dict[str, Any]:
    """Write ``comparison.json`` and ``report.html`` into ``out``; returns what the former holds.

    Raises:
        RecipeFault: settings differ and ``anyway`` is not said, or ``select_by`` was not measured.
    """
    sides = open_sides(paths)
    problems = differences(sides)
    if problems and not anyway:
        lines = [*problems[:8], *([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])]
        raise RecipeFault(
            [*lines, "they are not comparable; --anyway compares what pairs there are, and says so"],
            what="comparison",
        )
    prompts, measured = common(sides, by_text=any("other prompts" in problem for problem in problems))
    base = measured[0]
    pairs = {m.name: comparisons(base, m, prompts) for m in measured[1:]}
    if not any(c.difference.n for found in pairs.values() for c in found.values()):
        raise RecipeFault(
            ["they have no measure or no pair in common; score both with the same rewards"], what="comparison"
        )
    measure = _known(select_by, pairs) if select_by else sides[0].job.select_by
    tree = {
        "baseline": base.name,
        "compared": {m.name: side.origin for m, side in zip(measured, sides, strict=True)},
        "differences_of_settings": problems,
        "measure": measure,
        "pairing": {m.name: pairing_row(base, m) for m in measured[1:]},
        "versions": versions(),
        "results": {name: {m: _row(c, base, prompts) for m, c in found.items()} for name, found in pairs.items()},
    }
    tree = without_nan(tree)
    write_json(out / "comparison.json", tree)
    if report:
        settings = [*tree["compared"].items(), *(("differs", problem) for problem in problems)]
        page = comparison_report(measured, pairs, prompts, settings, measure, command())
        write_report(page, out / "report.html")
    return tree


def _known(asked: str, pairs: Mapping[str, Mapping[str, Comparison]]) -> str:
    """The measure asked for, or the toy that stands in its place where the embedded model drew."""
    there = list(dict.fromkeys(name for found in pairs.values() for name in found))
    for name in (asked, rewards.TOYS.get(asked)):
        if name in there:
            return name
    raise RecipeFault(
        [f"--select-by: {asked} is not among the measures in common; take one of {', '.join(there)}"],
        what="command line",
    )


def _row(c: Comparison, base: Measured, prompts: Prompts) -> dict[str, Any]:
    order = sorted(c.gains, key=lambda prompt: c.gains[prompt])
    said = [{"prompt": prompts.prompts[i].text, "index": i, "difference": c.gains[i]} for i in order]
    return {
        "difference": asdict(c.difference),
        "win_rate": asdict(c.wins),
        "categories": {name: asdict(value) for name, value in c.categories.items()},
        "best": said[::-1][:5],
        "worst": said[:5],
    }
