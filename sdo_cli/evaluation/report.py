"""What the report of an evaluation or a comparison says."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rewards
from sdo_cli.evaluation.job import Item, Job, Place, Prompts, Variant
from sdo_cli.evaluation.summary import (
    Comparison,
    Measured,
    Table,
    checkpoint_curves,
    comparisons,
    pairing,
    pairing_row,
    recommendations,
    scale_of,
    scored_prompts,
    step_of,
    sweeps,
    values_of,
    ways,
)
from sdo_cli.provenance import machine, versions
from sdo_cli.reports import content
from sdo_cli.scoring.measure_names import BETWEEN_PICTURES, DISTANCES, DIVERSITIES, DIVERSITY
from sdo_cli.scoring.statistics import Interval, mean_interval, too_few

# of so many variants every measure is said
MOST_SAID = 1
HOW_TO_READ = (
    "The unit is the prompt: its seeds are averaged first. Brackets hold 95 % intervals by a studentized bootstrap "
    "over prompts; win rates count prompts, ties half, with Wilson's interval."
)


def evaluation_report(job: Job, measured: list[Measured], tree: Mapping[str, Any], folder: Path) -> content.Report:
    """Of one evaluation: every variant beside the first."""
    base, measures = measured[0], _measures(measured)
    pairs = {m.name: comparisons(base, m, job.prompts) for m in measured[1:]}
    blocks: list[content.Chart | content.Forest | content.Table] = [_means(job, measured, measures)]
    blocks += _difference_blocks(measured, pairs, job.prompts)
    for lora, sweep in sweeps(measured).items():
        blocks += [_sweep_chart(lora, sweep, name, job) for name in measures if all(m.scores.get(name) for m in sweep)]
    for run, curve in checkpoint_curves(measured).items():
        blocks += [_curve_chart(run, curve, name, job) for name in measures if all(m.scores.get(name) for m in curve)]
    if table := _reference_table(tree):
        blocks.append(table)
    count = len({item.prompt for item in base.items})
    return content.Report(
        title=f"Evaluation: {_named(measured)}",
        subtitle=f"{_counted(count, 'prompt')} of {job.prompts.name}, {images_said(measured)}",
        verdict=_concluded(measured, pairs, job, tree),
        blocks=blocks,
        gallery=_gallery(measured, measures, job.prompts),
        settings=_settings(job, tree),
        machine=facts(),
        repeat=[_repeat(folder)],
    )


def _concluded(
    measured: list[Measured], pairs: Mapping[str, Mapping[str, Comparison]], job: Job, tree: Mapping[str, Any]
) -> list[str]:
    """What the variants come to, and which scale to take; of few prompts why neither is said."""
    if pairs and (few := too_few(scored_prompts(measured[0]))):
        return [few]
    said = {name: pairs[name] for name in _said_first(measured)}
    return _verdict(measured[0], said, job.select_by) + _recommended(tree)


def comparison_report(
    measured: list[Measured],
    pairs: Mapping[str, Mapping[str, Comparison]],
    prompts: Prompts,
    settings: list[tuple[str, str]],
    select_by: str,
    command: str,
) -> content.Report:
    """Of several variants, which may come from several evaluations, against the first."""
    base, measures = measured[0], _measures(measured)
    count = max((c.difference.n for found in pairs.values() for c in found.values()), default=0)
    return content.Report(
        title=f"Comparison: {' against '.join([', '.join(m.name for m in measured[1:]), base.name])}",
        subtitle=f"{count} prompts of {prompts.name} that all have, {_ways(measured)}",
        verdict=[few] if (few := too_few(count)) else _verdict(base, pairs, select_by),
        blocks=_difference_blocks(measured, pairs, prompts),
        gallery=_gallery(measured, measures, prompts),
        settings=settings,
        machine=facts(),
        repeat=[command],
    )


def _named(measured: list[Measured]) -> str:
    names = [m.name for m in measured]
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def images_said(measured: list[Measured]) -> str:
    """``2 images each`` where it is so everywhere, else how many each variant has."""
    each = {count for m in measured for count in Counter(item.prompt for item in m.items).values()}
    prompts = {frozenset(item.prompt for item in m.items) for m in measured}
    if len(each) == 1 and len(prompts) == 1:
        return f"{_counted(each.pop(), 'image')} each"
    counts = [(m.name, _counted(len(m.items), "image"), len({item.prompt for item in m.items})) for m in measured]
    if len(counts) == 1:
        return counts[0][1]
    if len(prompts) == 1:
        return ", ".join(f"{images} of {name}" for name, images, _ in counts)
    return ", ".join(f"{images} of {name} ({_counted(count, 'prompt')})" for name, images, count in counts)


def _ways(measured: list[Measured]) -> str:
    return ways({m.name: pairing_row(measured[0], m) for m in measured[1:]})


def _said_first(measured: list[Measured]) -> list[str]:
    """One variant of each LoRA, with every call its own and at scale 1 where there is such, and every other but the
    baseline."""
    chosen: dict[str, Measured] = {}

    def rank(m: Measured) -> tuple[bool, bool]:
        return m.variant.whole, m.variant.scale == 1

    for m in measured[1:]:
        # of a run's checkpoints the last
        run, at, mark = (m.variant.lora or "").rpartition("@")
        is_step = bool(at) and mark.isdecimal()
        key = run if is_step else m.variant.lora or m.name
        if key not in chosen or rank(m) > rank(chosen[key]) or (rank(m) == rank(chosen[key]) and rank(m)[1]):
            chosen[key] = m
    return [m.name for m in chosen.values()]


def facts() -> list[tuple[str, str]]:
    """Machine and versions."""
    return [*machine().items(), *versions().items()]


def _measures(measured: list[Measured]) -> list[str]:
    return list(dict.fromkeys(name for m in measured for name, table in m.scores.items() if table))


def number(value: float) -> str:
    return f"{value:.4f}" if value == value else "–"


def signed(interval: Interval) -> str:
    """``+0.0123 [+0.0100, +0.0146]``, a dash where an end cannot be told."""
    ends = [f"{v:+.4f}" if v == v else "–" for v in (interval.mean, interval.low, interval.high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def percent(interval: Interval) -> str:
    ends = [f"{100 * v:.0f}" if v == v else "–" for v in (interval.mean, interval.low, interval.high)]
    return f"{ends[0]} % [{ends[1]}, {ends[2]}]"


def role_of(name: str, job: Job) -> str:
    if name in BETWEEN_PICTURES:
        return "of the images"
    if name in job.trained_on:
        return "trained"
    if name in job.judges:
        return "outside, only measures"
    return "only measures" if name in rewards.MEASURE_ONLY else ""


def _means(job: Job, measured: list[Measured], measures: list[str]) -> content.Table:
    rows = []
    for m in measured:
        for name in measures:
            if m.scores.get(name):
                found = mean_interval(values_of(m.scores[name]))
                ends = f"[{number(found.low)}, {number(found.high)}]"
                rows.append([m.name, name, role_of(name, job), number(found.mean), ends, str(found.n)])
    head = ["images of", "measure", "", "mean", "95 % interval", "prompts"]
    return content.Table("Means", head, rows, note=HOW_TO_READ)


def _difference_blocks(
    measured: list[Measured], pairs: Mapping[str, Mapping[str, Comparison]], prompts: Prompts
) -> list[content.Chart | content.Forest | content.Table]:
    if not pairs:
        return []
    base = measured[0]
    rows = [
        [name, measure, signed(c.difference), percent(c.wins), str(c.difference.n)]
        for name, found in pairs.items()
        for measure, c in found.items()
    ]
    head = ["images of", "measure", f"difference to {base.name}", "higher on", "prompts"]
    notes = [note for m in measured[1:] if (note := pairing(base, m).note)]
    blocks: list[content.Chart | content.Forest | content.Table] = [
        content.Table(
            f"Differences to {base.name}, {_ways(measured)}", head, rows, note=" ".join(f"{n}." for n in notes)
        )
    ]
    measures = list(dict.fromkeys(measure for found in pairs.values() for measure in found))
    for measure in measures:
        lines = []
        for name, found in pairs.items():
            if measure not in found:
                continue
            whole = found[measure]
            if whole.difference.low == whole.difference.low:
                lines.append(_row("all prompts", whole.difference, name))
            for category in prompts.categories:
                if category in whole.categories:
                    lines.append(_row(category, whole.categories[category], name))
        if lines:
            blocks.append(content.Forest(f"{measure}: difference to {base.name}", measure, lines))
    return blocks


def _row(label: str, interval: Interval, group: str) -> content.IntervalRow:
    span = content.Interval(interval.mean, interval.low, interval.high)
    return content.IntervalRow(label, span, f"{signed(interval)}, {interval.n} prompts", group)


def _sweep_chart(lora: str, sweep: list[Measured], name: str, job: Job) -> content.Chart:
    at = [scale_of(m.variant) for m in sweep]
    return _means_chart(sweep, at, "LoRA scale", f"the scale of {_lora_of(lora, sweep)}", name, job)


def _curve_chart(run: str, curve: list[Measured], name: str, job: Job) -> content.Chart:
    at = [float(step_of(m.variant)) for m in curve]
    return _means_chart(curve, at, "step", f"the step of {Path(run).name}", name, job)


def _means_chart(variants: list[Measured], at: list[float], axis: str, by: str, name: str, job: Job) -> content.Chart:
    """Means of one measure with their intervals over what the variants differ in."""
    found = [mean_interval(values_of(m.scores[name])) for m in variants]
    low, high = [f.low for f in found], [f.high for f in found]
    series = content.Series(name=name, x=at, y=[f.mean for f in found], low=[*low], high=[*high])
    role = role_of(name, job)
    note = "Intervals are of each mean; neighbours share prompts and noise, so differences are known better."
    title = f"{name}{f' ({role})' if role else ''} by {by}"
    return content.Chart(title, axis, name, [series], note=note, markers=True)


def _lora_of(lora: str, sweep: list[Measured]) -> str:
    """Its name in this evaluation, without a scale."""
    return next(m.name.partition("@")[0] for m in sweep if m.variant.lora == lora)


def _reference_table(tree: Mapping[str, Any]) -> content.Table | None:
    rows = [
        [name, key.replace("_", " "), f"{value:.4g}"]
        for name, entry in tree["variants"].items()
        for key, value in entry.get("reference", {}).items()
    ]
    note = "FID is biased upwards for small sets: compare only sets of the same size. KID is not."
    return (
        content.Table("Distance to the reference images", ["images of", "", "value"], rows, note=note) if rows else None
    )


def _verdict(base: Measured, pairs: Mapping[str, Mapping[str, Comparison]], select_by: str) -> list[str]:
    """The chosen measure of every variant, and of the first few what the others say."""
    sentences = []
    for number, (name, found) in enumerate(pairs.items()):
        order = [m for m in (select_by, *found) if m in found and m not in DISTANCES]
        for measure in dict.fromkeys(order if number < MOST_SAID else order[:1]):
            c = found[measure]
            if measure in DIVERSITIES:
                more = "more" if c.difference.low > 0 else "less" if c.difference.high < 0 else "neither more nor less"
                by = measure.removeprefix(DIVERSITY).replace("-", " by ", 1)
                sentences.append(
                    f"Images of one prompt are {more} different than {base.name}'s{by}: {signed(c.difference)}."
                )
                continue
            said = "cannot be told from"
            if c.difference.low > 0 or c.difference.high < 0:
                said = "is better than" if c.difference.low > 0 else "is worse than"
            sentences.append(
                f"By {measure}, {name} {said} {base.name}: {signed(c.difference)}, higher on {percent(c.wins)} of "
                f"{c.difference.n} prompts."
            )
    return sentences


def _recommended(tree: Mapping[str, Any]) -> list[str]:
    found = [f"{text[0].upper()}{text[1:]}." for text in recommendations(tree)]
    return [*found, "Chosen on these prompts: state the gain on others."] if found else []


def _settings(job: Job, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("prompts", f"{job.prompts.name} ({job.prompts.source})")]
    if job.settings is not None:
        flat = {key.removeprefix("model."): value for key, value in job.settings.flat().items()}
        found += [
            (key.replace("_", " "), str(value))
            for key, value in flat.items()
            if value not in (None, "") and key != "prompts"
        ]
    for variant in job.variants:
        if variant.lora:
            late = f" from step {variant.from_step}" if variant.from_step else ""
            found.append((variant.name, f"{variant.lora} at scale {variant.scale:g}{late}{_skipping(variant)}"))
        elif variant.plan:
            found.append((variant.name, f"the plain model{_skipping(variant)}"))
        elif variant.folder:
            found.append((variant.name, variant.folder))
    for name, spec in job.rewards.items():
        given = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        found.append((name, given or "as published"))
    for name, judge in job.judges.items():
        found.append((name, f"{judge.target} ({judge.version or 'not asked yet'})"))
    return [*found, ("settings hash", tree["settings_hash"][:16])]


def _repeat(folder: Path) -> str:
    from sdo_cli.files import read_json

    manifest = folder / "manifest.json"
    return read_json(manifest)["command"] if manifest.exists() else f"sdo report {shlex.quote(str(folder))}"


def _gallery(measured: list[Measured], measures: list[str], prompts: Prompts) -> content.Gallery:
    rows: dict[tuple[int, int, int], dict[str, Item]] = defaultdict(dict)
    for m in measured:
        pairs = pairing(measured[0], m).pairs
        for item in m.items:
            prompt, index = pairs.get(_place(item), _place(item))
            # one without its pair stands alone, not beside what has its number
            alone = bool(pairs) and _place(item) not in pairs and item.seed is not None
            rows[prompt, int(alone), item.seed if alone and item.seed is not None else index][m.name] = item
    cases, count = [], Counter[int]()
    # every image that any variant has, in the order of the set
    for _, row in sorted(rows.items()):
        item = next(iter(row.values()))
        images = [m.folder / row[m.name].file if m.name in row else None for m in measured]
        scores = {
            name: [_score(m.scores.get(name, {}), row[m.name]) if m.name in row else None for m in measured]
            for name in measures
        }
        details = f"prompt {item.prompt}" + (f", seed {item.seed}" if item.seed is not None else "")
        name = f"{item.prompt:05d}_{count[item.prompt]:02d}"
        count[item.prompt] += 1
        cases.append(content.Case(name, item.text, item.category, images, scores, details))
    return content.Gallery([m.name for m in measured], measures, cases)


def _place(item: Item) -> Place:
    return item.prompt, item.seed_index


def _score(table: Table, item: Item) -> float | None:
    return table.get(_place(item), table.get((item.prompt, None)))


def _skipping(variant: Variant) -> str:
    return f", skipping as {variant.plan} says" if variant.plan else ""
