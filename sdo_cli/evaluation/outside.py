"""Scores that come from outside this process, into an evaluation's folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import rewards
from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.evaluation import SETTINGS, Evaluation, job_tree
from sdo_cli.evaluation.job import Item
from sdo_cli.evaluation.score import Score, ScoreFile, running_mean
from sdo_cli.files import file_hash, write_json
from sdo_cli.judges.answers import Picture
from sdo_cli.judges.ask import ask
from sdo_cli.judges.spec import TABLE, JudgeSpec, Outside
from sdo_cli.judges.table import read_scores
from sdo_cli.progress import Reporter
from sdo_cli.scoring.measure_names import BETWEEN_PICTURES

# by measure: the file, and scores by variant and picture
Tables = dict[str, tuple[Path, dict[str, dict[str, float]]]]


def own_measures() -> set[str]:
    """Names that judges and columns cannot have."""
    return {*rewards.known_names(), *BETWEEN_PICTURES}


def read_tables(evaluation: Evaluation, paths: Sequence[Path], note: Callable[[str], None]) -> Tables:
    """Tables of scores made elsewhere, held against the folder's pictures and what is known of them.

    Raises:
        RecipeFault: one that does not fit, or that says other scores than the folder holds.
    """
    found: Tables = {}
    images = {name: [item.file for item in items] for name, items in evaluation.items.items()}
    asked = {name for name, judge in evaluation.job.judges.items() if judge.kind != TABLE}
    known = ScoreFile(evaluation.folder / "scores.jsonl") if paths else None
    for path in paths:
        table = read_scores(path, images, own_measures() | evaluation.job.rewards.keys() | asked)
        if table.left_out:
            note(f"{path}: left out {', '.join(table.left_out)}, which sdo measures or a judge is asked for")
        for measure, scores in table.scores.items():
            if measure in found:
                raise RecipeFault([f"--scores {path}: {measure} is in {found[measure][0]} too"], what="command line")
            for variant, by_file in scores.items():
                before = known.of(variant, measure) if known else {}
                for item in evaluation.items[variant]:
                    there = before.get((item.prompt, item.seed_index))
                    if there is not None and there != by_file[item.file]:
                        text = (
                            f"{measure} of {variant}/{item.file} is {by_file[item.file]!r}, and {there!r} in the folder"
                        )
                        raise RecipeFault([f"--scores {path}: {text}; rename the column"], what="command line")
            found[measure] = path, scores
    return found


def ask_outside(
    evaluation: Evaluation, outside: Outside, tables: Tables, reporter: Reporter, tick: Callable[[], None]
) -> None:
    """Take the tables' scores, and ask every judge for the pictures that it has not scored.

    Raises:
        EnvironmentFault: a judge failed for good; what it said before is kept.
    """
    if not tables and not outside.judges:
        return
    scores = ScoreFile(evaluation.folder / "scores.jsonl")
    for measure, (path, by_variant) in tables.items():
        _settle(evaluation, measure, JudgeSpec(TABLE, str(path), version=f"sha256 {file_hash(path)[:16]}"))
        for variant, by_file in by_variant.items():
            items = evaluation.items[variant]
            scores.add([_line(variant, measure, item, by_file[item.file]) for item in items])
    for name in outside.judges:
        _ask(evaluation, name, outside, scores, reporter, tick)


def _ask(
    evaluation: Evaluation,
    name: str,
    outside: Outside,
    scores: ScoreFile,
    reporter: Reporter,
    tick: Callable[[], None],
) -> None:
    """One judge, of every variant's pictures, so that a command loads its model once for all."""
    places = {
        f"{variant}/{item.file}": (variant, item) for variant, items in evaluation.items.items() for item in items
    }
    folders = {variant.name: evaluation.images(variant) for variant in evaluation.job.variants}
    missing = [
        Picture(key, folders[variant] / item.file, item.text)
        for key, (variant, item) in places.items()
        if not scores.has(variant, name, item.prompt, item.seed_index)
    ]
    if not missing:
        return
    reporter.phase(name, len(places), len(places) - len(missing))

    def keep(found: dict[str, float], version: str) -> None:
        # first: scores without their version would be taken for those of any
        if evaluation.job.judges[name].version != version:
            _settle(evaluation, name, replace(evaluation.job.judges[name], version=version))
        scores.add([_line(places[key][0], name, places[key][1], score) for key, score in found.items()])
        if found:
            reporter.advance(len(found), running_mean(scores, places[next(iter(found))][0], name))

    spec, folder = evaluation.job.judges[name], evaluation.folder
    ask(name, spec, missing, folder, outside.asking, keep=keep, tick=tick, note=reporter.note)


def _settle(evaluation: Evaluation, name: str, judge: JudgeSpec) -> None:
    """Put what a judge is into the folder."""
    evaluation.job = replace(evaluation.job, judges={**evaluation.job.judges, name: judge})
    write_json(evaluation.folder / SETTINGS, job_tree(evaluation.job))


def _line(variant: str, measure: str, item: Item, score: float) -> Score:
    return Score(variant, measure, item.prompt, item.seed_index, item.file, score)
