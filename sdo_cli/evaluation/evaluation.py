"""An evaluation folder: what it is, whether it may be continued, and what it holds so far."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import rewards
from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.folders import folder_hash, read_folder
from sdo_cli.evaluation.job import (
    EvalPrompt,
    Item,
    Job,
    Prompts,
    Variant,
    as_settings,
    as_variant,
    digest,
    items_of,
    pairs_by_seed,
)
from sdo_cli.evaluation.layouts import short
from sdo_cli.evaluation.score import EMBEDDED_MEASURES, ScoreFile
from sdo_cli.evaluation.summary import Measured
from sdo_cli.files import read_json
from sdo_cli.judges.spec import JudgeSpec
from sdo_cli.prompt_sets.syntax import syntax_notes
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.scoring.measure_names import DISTANCE, distance_by, diversity_by
from sdo_cli.scoring.rewards import sources

SETTINGS = "settings.json"


class Evaluation:
    """An evaluation folder: its settings, images and scores.

    Args:
        job: what to draw and measure.
        folder: new, or one that holds an evaluation with the same settings, which is then continued.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.items = {variant.name: self._items(variant) for variant in job.variants}

    @classmethod
    def open(cls, folder: Path) -> "Evaluation":
        """One on disk.

        Raises:
            RecipeFault: the folder holds none.
        """
        path = folder / SETTINGS
        if not path.is_file():
            raise RecipeFault([f"{folder}: holds no evaluation (no {SETTINGS})"], what="command line")
        return cls(job_from(read_json(path)), folder)

    def _items(self, variant: Variant) -> list[Item]:
        if variant.items is not None:
            return list(variant.items)
        if variant.folder is not None:
            return read_folder(Path(variant.folder), self.job.prompts)[1]
        assert self.job.settings is not None
        return items_of(self.job.prompts, self.job.settings)

    def images(self, variant: Variant) -> Path:
        """The folder of a variant's images."""
        return Path(variant.folder) if variant.folder is not None else self.folder / variant.name

    def measured(self) -> list[Measured]:
        """Every variant with the scores there are."""
        scores = ScoreFile(self.folder / "scores.jsonl")
        names = [*self.job.rewards, *self.job.judges, *(EMBEDDED_MEASURES if self.job.embedding else ())]
        first, found = self.job.variants[0].name, []
        for variant in self.job.variants:
            tables = {name: scores.of(variant.name, name) for name in names}
            for kind in self.job.distances:
                tables[diversity_by(kind)] = scores.of(variant.name, diversity_by(kind))
                tables[distance_by(kind)] = scores.of(variant.name, distance_to(kind, first))
            if DISTANCE in tables:
                # lines of before pairs went by noise may be there, and those to what was the first variant then
                items = self.items[variant.name]
                pairs = {} if variant.name == first else pairs_by_seed(self.items[first], items)
                tables[DISTANCE] = {key: value for key, value in tables[DISTANCE].items() if key in pairs}
            tables = {name: table for name, table in tables.items() if table}
            found.append(Measured(variant, self.images(variant), self.items[variant.name], tables))
        return found


def distance_to(kind: str, base: str) -> str:
    """What a line of ``scores.jsonl`` calls the measure: a baseline that comes later has lines of its own."""
    return f"{distance_by(kind)} {base}"


def job_tree(job: Job) -> dict[str, Any]:
    """What ``settings.json`` holds."""
    measured = {"rewards": {name: spec.options for name, spec in job.rewards.items()}, "embedding": job.embedding}
    measured["reward_precision"] = job.reward_precision
    # folders of before there were judges keep their hash
    if job.judges:
        measured["judges"] = {name: asdict(spec) for name, spec in job.judges.items()}
    if job.distances:
        measured["distances"] = dict(job.distances)
    drawn = job.settings.tree() if job.settings else None
    # files stay out: their times differ where they are copied
    code = {name: found["code"] for name, found in job.sources.items() if "code" in found}
    return {
        "hash": digest([drawn, job.prompts.fingerprint, measured | ({"code": code} if code else {})]),
        "settings": drawn,
        **measured,
        "sources": {name: dict(found) for name, found in job.sources.items()},
        "select_by": job.select_by,
        "trained_on": job.trained_on,
        "variants": [asdict(variant) for variant in job.variants],
        "prompts": {
            "name": job.prompts.name,
            "source": job.prompts.source,
            "fingerprint": job.prompts.fingerprint,
            "list": [[p.text, p.category] for p in job.prompts.prompts],
        },
    }


def job_from(tree: dict[str, Any]) -> Job:
    prompts = tree["prompts"]
    return Job(
        prompts=Prompts(prompts["name"], prompts["source"], [EvalPrompt(*pair) for pair in prompts["list"]]),
        settings=as_settings(tree["settings"]) if tree["settings"] else None,
        variants=[as_variant(entry) for entry in tree["variants"]],
        # of a mixture before its toys had names of their own
        rewards={name: RewardSpec(name, options=_as_now(name, options)) for name, options in tree["rewards"].items()},
        reward_precision=tree["reward_precision"],
        embedding=tree["embedding"],
        select_by=tree["select_by"],
        trained_on=tree["trained_on"],
        sources=tree.get("sources", {}),
        judges={name: JudgeSpec(**spec) for name, spec in tree.get("judges", {}).items()},
        distances=tree.get("distances", {}),
    )


def _as_now(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return rewards.by_its_name(name, options)[1] if name == "mixture" else options


def joined(job: Job, folder: Path) -> Job:
    """``job``, with what an evaluation in ``folder`` already has: more LoRAs and rewards may be added to it.

    Raises:
        RecipeFault: the folder holds something else, or an evaluation with other settings.
    """
    path = folder / SETTINGS
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise RecipeFault(
                [f"--out {folder}: is not empty and holds no evaluation; give another folder"], what="command line"
            )
        return replace(job, sources=_sources(job.rewards))
    before = job_from(read_json(path))
    problems = list(_clashes(before, job))
    if not problems:
        problems = list(_changed_rewards(before, job))
    if problems:
        lines = [f"--out {folder}: holds an evaluation with other settings: {problem}" for problem in problems]
        raise RecipeFault([*lines[:6], "give another folder, or the same settings to continue it"], what="command line")
    variants = {variant.name: variant for variant in (*before.variants, *job.variants)}
    merged = before.rewards | job.rewards
    return replace(
        job,
        sources=_sources(merged),
        variants=in_order(list(variants.values())),
        rewards=merged,
        embedding=before.embedding or job.embedding,
        trained_on=list(dict.fromkeys((*before.trained_on, *job.trained_on))),
        judges={**before.judges, **{name: _as_known(before, name, spec) for name, spec in job.judges.items()}},
        distances={**before.distances, **job.distances},
    )


def _as_known(before: Job, name: str, spec: JudgeSpec) -> JudgeSpec:
    """A judge may have moved: what its scores are by is its version, which is looked at when it answers."""
    known = before.judges.get(name)
    return spec if known is None else replace(spec, version=known.version)


def _sources(specs: Mapping[str, RewardSpec]) -> dict[str, dict[str, str]]:
    return {name: sources(name, spec.options) for name, spec in specs.items()}


def _changed_rewards(before: Job, job: Job) -> Iterable[str]:
    """Scores of before and after such a change are not of one measure."""
    for name, spec in before.rewards.items():
        if not rewards.resolve(name):
            yield f"{name} there is of a plug-in that is not loaded here; give it with --plugin"
            continue
        kept, now = before.sources.get(name), sources(name, job.rewards.get(name, spec).options)
        if kept is None or kept == now:
            continue
        changed = [key for key in dict.fromkeys((*kept, *now)) if kept.get(key) != now.get(key)]
        parts = ["its plug-in's code" if key == "code" else f"what {key} names" for key in changed]
        yield f"{name} was scored before {' and '.join(parts)} changed"


def in_order(variants: list[Variant]) -> list[Variant]:
    """The plain model and folders as they come, then each LoRA by scale and step; then the same with each skip plan."""
    loras, plans = (list(dict.fromkeys(values)) for values in zip(*((v.lora, v.plan) for v in variants), strict=True))

    def place(v: Variant) -> tuple[bool, int, bool, int, float, int]:
        scale = v.scale if v.lora else 0.0
        return v.plan is not None, plans.index(v.plan), v.lora is not None, loras.index(v.lora), scale, v.from_step

    return sorted(variants, key=place)


def _clashes(before: Job, job: Job) -> Iterable[str]:
    if (before.settings is None) != (job.settings is None):
        yield "images of a folder beside images sdo draws"
    elif before.settings is not None and job.settings is not None:
        mine, theirs = before.settings.flat(), job.settings.flat()
        changed = [key for key in mine if mine[key] != theirs[key] and key != "prompts"]
        yield from (f"{key} is {mine[key]!r} there, {theirs[key]!r} here" for key in changed)
    if before.prompts.fingerprint != job.prompts.fingerprint:
        counts = [f"{len(prompts.prompts)} prompts of {prompts.name}" for prompts in (before.prompts, job.prompts)]
        yield f"{counts[0]} there, {counts[1]} here{_first_other(before.prompts, job.prompts)}"
    if before.reward_precision != job.reward_precision:
        yield f"reward precision is {before.reward_precision} there, {job.reward_precision} here"
    known = {variant.name: variant for variant in before.variants}
    for variant in job.variants:
        other = known.get(variant.name, variant)
        if other != variant:
            kind = "images" if variant.folder else "LoRA or skip plan" if variant.plan else "LoRA"
            yield f"its {kind} {variant.name} has changed, or is another one of that name"
    for name, spec in job.rewards.items():
        if name in before.rewards and before.rewards[name].options != spec.options:
            yield f"options of {name} are {before.rewards[name].options} there, {dict(spec.options)} here"
    for name, by in job.distances.items():
        if (there := before.distances.get(name, by)) != by:
            yield f"{name} is by {there} there, by {by} here"
    for name, judge in job.judges.items():
        known_judge = before.judges.get(name, judge)
        for key in ("kind", "question"):
            if (there := getattr(known_judge, key)) != (here := getattr(judge, key)):
                yield f"the {key} of judge {name} is {there!r} there, {here!r} here"


def _first_other(there: Prompts, here: Prompts) -> str:
    """The first prompt that differs, to append: one that only one side has, else one at another place or category."""
    sides = [[p.text for p in prompts.prompts] for prompts in (there, here)]
    for mine, others, where in ((*sides, "there"), (*sides[::-1], "here")):
        known = set(others)
        if alone := next((text for text in mine if text not in known), None):
            return f" (only {where}: {short(alone)})"
    for number, (a, b) in enumerate(zip(there.prompts, here.prompts, strict=False)):
        if a.text != b.text:
            return f" (prompt {number} is {short(a.text)} there, {short(b.text)} here)"
        if a.category != b.category:
            return f" (of {short(a.text)} the category is {a.category or 'none'} there, {b.category or 'none'} here)"
    return ""


def _in_the_order_of(first: Prompts, own: Prompts, items: list[Item]) -> tuple[Prompts, list[Item]]:
    """Equal prompts under the numbers that the first folder gave them; as they are where they are not equal."""
    texts = [prompt.text for prompt in first.prompts]
    mine = [prompt.text for prompt in own.prompts]
    if mine == texts or len(set(texts)) < len(texts) or sorted(mine) != sorted(texts):
        return own, items
    items = sorted(
        (replace(item, prompt=texts.index(item.text)) for item in items),
        key=lambda item: (item.prompt, item.seed_index),
    )
    return replace(own, prompts=[own.prompts[mine.index(text)] for text in texts]), items


class Folders(NamedTuple):
    """Folders made elsewhere as variants, their prompts, and sentences about them."""

    variants: list[Variant]
    prompts: Prompts
    notes: list[str]


def folder_variants(folders: list[Path], prompts: Prompts | None, limit: int | None = None) -> Folders:
    """Folders made elsewhere as variants, and their prompts, which must be the same.

    Args:
        limit: only the first so many prompts.

    Raises:
        RecipeFault: a folder that cannot be read, or whose prompts are not those of the first.
    """
    variants: list[Variant] = []
    notes: list[str] = []
    first: Prompts | None = None
    for folder in folders:
        own, items, said = read_folder(folder, prompts, limit=limit)
        notes += said
        if first is not None and prompts is None:
            own, items = _in_the_order_of(first, own, items)
        if first is not None and [p.text for p in own.prompts] != [p.text for p in first.prompts]:
            other = _first_other(first, own)
            raise RecipeFault(
                [f"--images {folder}: has other prompts than {folders[0]}{other}; score them one by one"],
                what="command line",
            )
        first = first or own
        name = folder.resolve().name
        taken = {variant.name for variant in variants}
        unique = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
        fingerprint = folder_hash(folder, items)
        variants.append(Variant(unique, folder=str(folder.resolve()), fingerprint=fingerprint, items=tuple(items)))
    assert first is not None
    notes += syntax_notes(item.text for variant in variants for item in variant.items or ())
    if prompts is not None:
        first = Prompts(prompts.name, prompts.source, prompts.prompts[:limit])
    return Folders(variants, first, notes)
