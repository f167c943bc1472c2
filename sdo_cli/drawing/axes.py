"""What varies over the pictures of a grid, and how that is laid out on sheets; imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from math import prod
from typing import Any

from sdo_cli.models.lora_stack import stack_of

# of the values of axes that are neither rows nor columns, one sheet each
MOST_SHEETS = 12
# rows, and columns, of a sheet
MOST_LINES = 100
# every LoRA at every scale, the plain model once
VARIANTS = "variants"
AXES = ("prompts", "loras", "scales", "seeds", "steps", "guidance")
# what is columns, and what is rows, where nobody says so
AS_COLUMNS = ("scales", VARIANTS, "loras", "guidance", "steps", "seeds", "prompts")
AS_ROWS = ("prompts", "seeds", "steps", "guidance", "loras", VARIANTS, "scales")


@dataclass(frozen=True)
class Cell:
    """Everything one picture is made of beside what the whole grid shares; equal cells are one picture."""

    prompt: str
    lora: str | None
    scale: float
    seed: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Values:
    """What each axis takes, in the order in which it was asked for; without LoRAs there are no scales."""

    prompts: tuple[str, ...]
    loras: tuple[str, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]

    @property
    def variants(self) -> tuple[tuple[str | None, float], ...]:
        return tuple(dict.fromkeys(variant_of(lora, s) for lora in self.loras for s in self.scales)) or ((None, 0.0),)

    def cells(self) -> list[Cell]:
        """Every picture once: prompts outermost, seeds innermost."""
        points = product(self.prompts, self.variants, self.steps, self.guidance, self.seeds)
        return [Cell(p, lora, scale, seed, steps, g) for p, (lora, scale), steps, g, seed in points]


def variant_of(lora: str | None, scale: float) -> tuple[str | None, float]:
    """LoRA and scale; a weight of nothing is the plain model, whichever LoRA it is of."""
    if lora is None or all(scale * one.scale == 0 for one in stack_of(lora)):
        return None, 0.0
    return lora, scale


@dataclass(frozen=True)
class Sheet:
    """Attributes:
    shown: the axis and value of what this sheet is of, beside rows and columns.
    cells: by row and column.
    """

    shown: dict[str, Any]
    cells: list[list[Cell]]


@dataclass(frozen=True)
class Layout:
    """Attributes:
    values: of every axis that counts here; LoRAs and scales may be one, ``variants``.
    rows, columns: names of axes, None for a single line.
    """

    values: Mapping[str, tuple[Any, ...]]
    rows: str | None
    columns: str | None

    @property
    def others(self) -> list[str]:
        """Axes with several values that make sheets."""
        return [name for name in varying(self.values) if name not in (self.rows, self.columns)]

    @property
    def sheet_count(self) -> int:
        return prod(len(self.values[name]) for name in self.others)

    def line(self, axis: str | None) -> tuple[Any, ...]:
        return (None,) if axis is None else self.values[axis]

    def sheets(self) -> Iterator[Sheet]:
        fixed = {name: some[0] for name, some in self.values.items() if len(some) == 1}
        for point in product(*(self.values[name] for name in self.others)):
            shown = dict(zip(self.others, point, strict=True))
            cells = [
                [_cell({**fixed, **shown, str(self.rows): r, str(self.columns): c}) for c in self.line(self.columns)]
                for r in self.line(self.rows)
            ]
            yield Sheet(shown, cells)


def _cell(point: Mapping[str, Any]) -> Cell:
    lora, scale = point[VARIANTS] if VARIANTS in point else variant_of(point.get("loras"), point.get("scales", 0.0))
    return Cell(point["prompts"], lora, scale, point["seeds"], point["steps"], point["guidance"])


def varying(values: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [name for name, some in values.items() if len(some) > 1]


def axis_named(text: str) -> str | None:
    """``lora`` is ``loras``; None for what is no axis."""
    return next((name for name in (*AXES, VARIANTS) if text.lower() in (name, name.removesuffix("s"))), None)


def laid_out(values: Values, rows: str | None, columns: str | None, wrong: list[str]) -> Layout | None:
    """Sheets of these values.

    The axes that vary and that nobody chose are taken by their kind. LoRAs and scales are one axis where a third varies
    too, unless one of them was chosen by name.

    Args:
        rows, columns: names as typed, None to choose here.
        wrong: takes what is wrong with them; then there is no layout.
    """
    chosen: dict[str, str | None] = {}
    for side, text in (("rows", rows), ("columns", columns)):
        chosen[side] = None if text is None else axis_named(text)
        if text is not None and chosen[side] is None:
            wrong.append(f"--{side}: {text!r} is none of {', '.join((*AXES, VARIANTS))}")
            return None
    named = [name for name in chosen.values() if name is not None]
    every = _axes(values, named)
    if len(named) == 2 and named[0] == named[1]:
        wrong.append(f"--columns: {named[1]} are the rows already; choose another, or leave one of the two out")
    elif missing := [name for name in named if name not in every]:
        why = "there is no --lora" if not values.loras else f"{VARIANTS} are LoRAs and scales in one"
        wrong.append(f"--{'rows' if chosen['rows'] == missing[0] else 'columns'}: no {missing[0]} here, {why}")
    if wrong:
        return None
    layout = _arranged(every, chosen["rows"], chosen["columns"])
    if layout.sheet_count > MOST_SHEETS:
        wrong.append(_too_many(layout))
    for side, axis in (("rows", layout.rows), ("columns", layout.columns)):
        if (count := len(layout.line(axis))) > MOST_LINES:
            wrong.append(
                f"--grid: {count} {axis} are more than the {MOST_LINES} {side} of a sheet; give fewer at a time, or "
                "leave --grid out"
            )
    return layout


def _axes(values: Values, named: list[str]) -> dict[str, tuple[Any, ...]]:
    every: dict[str, tuple[Any, ...]] = {name: getattr(values, name) for name in AXES}
    if not values.loras:
        every = {name: some for name, some in every.items() if name not in ("loras", "scales")}
        return every
    apart = {"loras", "scales"}
    both = all(len(every[name]) > 1 for name in apart)
    if VARIANTS in named or (both and len(varying(every)) > 2 and not apart & set(named)):
        return {VARIANTS: values.variants} | {name: some for name, some in every.items() if name not in apart}
    return every


def _arranged(values: Mapping[str, tuple[Any, ...]], rows: str | None, columns: str | None) -> Layout:
    left = [name for name in varying(values) if name not in (rows, columns)]
    if columns is None and left and not (rows is None and left == ["prompts"]):
        columns = next(name for name in AS_COLUMNS if name in left)
        left.remove(columns)
    if rows is None and left:
        rows = next(name for name in AS_ROWS if name in left)
    return Layout(values, rows, columns)


def _too_many(layout: Layout) -> str:
    """What varies, how many sheets that makes, and the choice that makes fewest."""
    vary = varying(layout.values)
    counts = [f"{name} ({len(layout.values[name])})" for name in vary]
    best = min(
        (Layout(layout.values, rows, columns) for rows, columns in permutations(vary, 2)),
        key=lambda one: one.sheet_count,
    )
    remedy = "give fewer values"
    if best.sheet_count <= MOST_SHEETS:
        sheets = f"{best.sheet_count} sheet{'s' * (best.sheet_count != 1)}"
        remedy = f"choose with --rows {best.rows} --columns {best.columns} ({sheets}), or {remedy}"
    return (
        f"--grid: {', '.join(counts[:-1])} and {counts[-1]} vary, which makes {layout.sheet_count} sheets of "
        f"{layout.rows} by {layout.columns}, more than {MOST_SHEETS}; {remedy}"
    )
