"""From scores to means, paired differences, win rates and a LoRA scale."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdo_cli.evaluation.job import Item, Job, Place, Prompts, Variant, pairs_by_seed
from sdo_cli.files import without_nan
from sdo_cli.scoring.statistics import Interval, Values, mean_interval, too_few, win_rate

Table = Mapping[tuple[int, int | None], float]

# categories with fewer prompts say too little to be listed
FEWEST_IN_CATEGORY = 2


@dataclass(frozen=True)
class Measured:
    """A variant with its images and scores, ``{measure: {(prompt, seed): score}}``."""

    variant: Variant
    folder: Path
    items: list[Item]
    scores: Mapping[str, Table]

    @property
    def name(self) -> str:
        return self.variant.name


@dataclass(frozen=True)
class Comparison:
    """B against A by one measure, over the prompts both have.

    Attributes:
        difference: mean of B - A.
        wins: share of prompts on which B is better, ties half.
        categories: the difference within each.
        gains: B - A by prompt.
    """

    measure: str
    difference: Interval
    wins: Interval
    categories: dict[str, Interval]
    gains: dict[int, float]


@dataclass(frozen=True)
class Pairing:
    """How the pictures of B are held against those of A.

    Attributes:
        by: ``noise`` where sdo drew both from the same, ``seed`` where the pictures state the same seeds, ``prompt``
            where only the means of each prompt can be compared.
        pairs: places of B's pictures to those of A's; empty by ``prompt``.
        note: what is left out, or why there are no pairs, as a sentence; empty where every picture has its pair.
    """

    by: str
    pairs: dict[Place, Place]
    note: str = ""

    @property
    def said(self) -> str:
        return {"noise": "same noise", "seed": "same seeds", "prompt": "prompt by prompt"}[self.by]


def pairing(a: Measured, b: Measured) -> Pairing:
    """By noise seed where that leaves no prompt out that both have, else by prompt."""
    pairs = pairs_by_seed(a.items, b.items)
    both = {item.prompt for item in a.items} & {item.prompt for item in b.items}
    if not pairs or both - {prompt for prompt, _ in pairs}:
        if all(item.seed is not None for item in (*a.items, *b.items)):
            why = "not every prompt has a seed that both name once, so differences are of each prompt's means"
        else:
            why = "their noise is not known, so differences are of each prompt's means, and no distance is measured"
        return Pairing("prompt", {}, f"{b.name} and {a.name}: {why}")
    left = len(a.items) + len(b.items) - 2 * len(pairs)
    note = f"{b.name} and {a.name}: {left} picture{'s' * (left != 1)} without one of the same seed, not in differences"
    drawn = a.variant.folder is None and b.variant.folder is None
    return Pairing("noise" if drawn else "seed", pairs, note if left else "")


def by_prompt(table: Table) -> dict[int, float]:
    """The mean over the seeds of each prompt."""
    found: dict[int, list[float]] = defaultdict(list)
    for (prompt, _), score in table.items():
        found[prompt].append(score)
    return {prompt: sum(found[prompt]) / len(found[prompt]) for prompt in sorted(found)}


def values_of(table: Table) -> Values:
    return np.array(list(by_prompt(table).values()), dtype=np.float64)


def compare(
    a: Table,
    b: Table,
    measure: str,
    category_of: Mapping[int, str],
    pairs: Mapping[Place, Place] | None = None,
) -> Comparison:
    """What only one side has is left out.

    Args:
        pairs: places of b's pictures to those of a's, where they are not the same; empty where none are known to be
            pairs: then the means of a prompt are held against each other.
    """
    if pairs is None:
        gains = by_prompt({key: b[key] - a[key] for key in sorted(set(a) & set(b), key=_order)})
    elif pairs and None not in {seed for _, seed in b}:
        gains = by_prompt({key: b[key] - a[at] for key, at in pairs.items() if key in b and at in a})
    else:
        mine, theirs = by_prompt(a), by_prompt(b)
        gains = {prompt: theirs[prompt] - mine[prompt] for prompt in mine if prompt in theirs}
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, gain in gains.items():
        if category := category_of.get(prompt, ""):
            groups[category].append(gain)
    values = np.array(list(gains.values()), dtype=np.float64)
    return Comparison(
        measure=measure,
        difference=mean_interval(values),
        wins=win_rate(values),
        categories={
            name: mean_interval(np.array(some)) for name, some in groups.items() if len(some) >= FEWEST_IN_CATEGORY
        },
        gains=gains,
    )


def _order(key: tuple[int, int | None]) -> tuple[int, int]:
    return key[0], -1 if key[1] is None else key[1]


def comparisons(a: Measured, b: Measured, prompts: Prompts) -> dict[str, Comparison]:
    """By measure, for those both have."""
    category_of = {index: prompt.category for index, prompt in enumerate(prompts.prompts)}
    pairs = pairing(a, b).pairs
    return {
        measure: compare(a.scores[measure], b.scores[measure], measure, category_of, pairs)
        for measure in b.scores
        if a.scores.get(measure) and b.scores[measure]
    }


def sweeps(measured: list[Measured]) -> dict[str, list[Measured]]:
    """Variants of one LoRA by rising scale, the base as scale 0; only LoRAs drawn at several scales."""
    base = [m for m in measured if m.variant.lora is None and m.variant.folder is None and m.variant.whole]
    by_lora: dict[str, list[Measured]] = defaultdict(list)
    for m in measured:
        if m.variant.lora is not None and m.variant.whole:
            by_lora[m.variant.lora].append(m)
    return {
        lora: sorted(base + some, key=lambda m: scale_of(m.variant)) for lora, some in by_lora.items() if len(some) > 1
    }


def checkpoint_curves(measured: list[Measured]) -> dict[str, list[Measured]]:
    """Variants that are checkpoints of one run, by rising step, the base as step 0; only runs with several."""
    base = [m for m in measured if m.variant.lora is None and m.variant.folder is None and m.variant.whole]
    by_run: dict[str, list[Measured]] = defaultdict(list)
    for m in measured:
        if (found := _at_step(m.variant)) is not None:
            by_run[found[0]].append(m)
    return {run: sorted(base + some, key=lambda m: step_of(m.variant)) for run, some in by_run.items() if len(some) > 1}


def step_of(variant: Variant) -> int:
    """Of the checkpoint that is drawn with; 0 for the base."""
    found = _at_step(variant)
    return found[1] if found else 0


def _at_step(variant: Variant) -> tuple[str, int] | None:
    """Run and step of a checkpoint at scale 1."""
    found = re.fullmatch(r"(.+)@([0-9]+)", variant.lora or "")
    return (found[1], int(found[2])) if found and variant.scale == 1 and variant.whole else None


def scale_of(variant: Variant) -> float:
    return variant.scale if variant.lora is not None else 0.0


def recommended(sweep: list[Measured], measure: str) -> Measured:
    """The first of a sweep that is not worse than the best one by more than chance (the interval of the difference).

    A larger scale, or more steps, that gains nothing certain only moves the images further from the base.
    """
    best = max(sweep, key=lambda m: float(values_of(m.scores[measure]).mean()))
    for m in sweep:
        if not compare(m.scores[measure], best.scores[measure], measure, {}).difference.low > 0:
            return m
    return best


def scored_prompts(m: Measured) -> int:
    """How many prompts its best covered measure has."""
    return max((len(values_of(table)) for table in m.scores.values() if table), default=0)


def summary(job: Job, measured: list[Measured], reference: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What ``summary.json`` holds; the same for the same scores, whenever and how often they were computed.

    Args:
        reference: by variant, distances between distributions (FID, KID).
    """
    base = measured[0]
    tree: dict[str, Any] = {
        "baseline": base.name,
        "prompts": {
            "name": job.prompts.name,
            "count": len({item.prompt for item in base.items}),
            "categories": job.prompts.categories,
        },
        "variants": {},
        "pairing": {m.name: pairing_row(base, m) for m in measured[1:]},
        "differences": {},
    }
    for m in measured:
        rows = {}
        for name, table in m.scores.items():
            if table:
                found = mean_interval(values := values_of(table))
                error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
                rows[name] = {**asdict(found), "standard_error": error, "scores": len(table)}
        tree["variants"][m.name] = {"images": len(m.items), **asdict(m.variant), "measures": rows}
        if m.name in reference:
            tree["variants"][m.name]["reference"] = dict(reference[m.name])
    for m in measured[1:]:
        tree["differences"][m.name] = {
            name: {
                "difference": asdict(found.difference),
                "win_rate": asdict(found.wins),
                "categories": {category: asdict(value) for category, value in found.categories.items()},
            }
            for name, found in comparisons(base, m, job.prompts).items()
        }
    if job.judges:
        tree["judges"] = {name: asdict(judge) for name, judge in job.judges.items()}
    chosen, found_sweeps, curves = {}, sweeps(measured), checkpoint_curves(measured)
    if (found_sweeps or curves) and (few := too_few(scored_prompts(base))):
        tree["no_recommendation"], found_sweeps, curves = few, {}, {}
    for lora, sweep in found_sweeps.items():
        if all(m.scores.get(job.select_by) for m in sweep):
            best = recommended(sweep, job.select_by)
            chosen[lora] = {"scale": scale_of(best.variant), **_chosen(sweep, best, job.select_by)}
    if chosen:
        tree["recommended_scale"] = chosen
    steps = {}
    for run, curve in curves.items():
        if all(m.scores.get(job.select_by) for m in curve):
            best = recommended(curve, job.select_by)
            steps[run] = {"step": step_of(best.variant), **_chosen(curve, best, job.select_by)}
    if steps:
        tree["recommended_checkpoint"] = steps
    return without_nan(tree)


def _chosen(sweep: list[Measured], best: Measured, measure: str) -> dict[str, Any]:
    highest = max(sweep, key=lambda m: float(values_of(m.scores[measure]).mean()))
    return {"by": measure, "variant": best.name, "highest": highest.name}


def recommendations(tree: Mapping[str, Any]) -> list[str]:
    """A sentence for every LoRA drawn at several scales and every run at several checkpoints."""
    base, count, found = tree["baseline"], tree["prompts"]["count"], []
    for kind, key, first in (("scale", "scale", "smallest"), ("checkpoint", "step", "earliest")):
        for name, entry in tree.get(f"recommended_{kind}", {}).items():
            by = entry["by"]
            if entry[key] or entry["highest"] == base:
                value = f"{entry[key]:g}" if kind == "scale" else f"{name}@{entry[key]}" if entry[key] else "none"
                text = f"recommended {kind} of {name}: {value}, the {first} that {by} cannot tell from the best"
                found.append(text if entry[key] else f"{text}, which is the model as it was")
            else:
                found.append(
                    f"{kind} of {name}: not decided by {count} prompts: {by} cannot tell any from the model as it was; "
                    f"highest is {entry['highest']}. More prompts or seeds may decide (--limit, --seeds), or another "
                    "measure (--select-by)"
                )
    return found


def pairing_row(a: Measured, b: Measured) -> dict[str, Any]:
    found = pairing(a, b)
    return {"by": found.by, "said": found.said, "pairs": len(found.pairs), "note": found.note}


def ways(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How pictures are held against the first variant's: in one word where it is the same for all."""
    said = list(dict.fromkeys(row["said"] for row in rows.values()))
    return said[0] if len(said) == 1 else ", ".join(f"{name} {row['said']}" for name, row in rows.items())


def scores_csv(measured: list[Measured], prompts: Prompts) -> str:
    """One row per image: variant, file, prompt, category, seed, then a column per measure."""
    names = list(dict.fromkeys(name for m in measured for name in m.scores))
    rows: list[list[Any]] = [["variant", "image", "prompt_index", "seed_index", "seed", "category", "prompt", *names]]
    for m in measured:
        for item in m.items:
            # what is measured per prompt stands beside each of its images
            found = [_at(m.scores.get(name, {}), item) for name in names]
            place = [item.prompt, item.seed_index, "" if item.seed is None else item.seed]
            rows.append([m.name, item.file, *place, item.category, item.text, *found])
    return as_csv(rows)


def _at(table: Table, item: Item) -> float | str:
    value = table.get((item.prompt, item.seed_index), table.get((item.prompt, None)))
    return "" if value is None else value


def summary_csv(tree: Mapping[str, Any]) -> str:
    """One row per variant and measure."""
    head = ["variant", "measure", "mean", "standard_error", "low", "high", "prompts"]
    head += ["difference", "difference_low", "difference_high", "win_rate", "win_rate_low", "win_rate_high"]
    rows: list[list[Any]] = [head]
    for variant, entry in tree["variants"].items():
        for measure, row in entry["measures"].items():
            found = tree["differences"].get(variant, {}).get(measure)
            gain = (
                [found[part][key] for part in ("difference", "win_rate") for key in ("mean", "low", "high")]
                if found
                else []
            )
            own = [row[key] for key in ("mean", "standard_error", "low", "high", "n")]
            rows.append([variant, measure, *own, *gain, *[""] * (6 - len(gain))])
    return as_csv(rows)


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(["" if v is None else v for v in row] for row in rows)
    return stream.getvalue()
