"""What a report can hold, as data; nothing here knows where it came from."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """A line of a chart; ``low`` and ``high`` are its band. None leaves a gap.

    ``pale`` draws it behind the others, as single batches behind their running mean; ``points`` draws error bars.
    """

    name: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    pale: bool = False
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """``markers`` draws every series as points with error bars."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    note: str = ""
    markers: bool = False


@dataclass(frozen=True)
class Interval:
    """NaN ends where they cannot be told."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class IntervalRow:
    label: str
    interval: Interval
    text: str = ""
    group: str = ""


@dataclass(frozen=True)
class Forest:
    """Horizontal intervals around a zero line; rows of one group stand together."""

    title: str
    x_label: str
    rows: list[IntervalRow]
    note: str = ""
    zero: float | None = 0.0


@dataclass(frozen=True)
class Table:
    """Cells already formatted."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One prompt and seed.

    Attributes:
        images: one per column of the gallery, None where there is none.
        scores: by measure, one per column.
    """

    key: str
    prompt: str
    category: str
    images: list[Path | None]
    scores: dict[str, list[float | None]]
    details: str = ""


@dataclass(frozen=True)
class Gallery:
    """Attributes:
    row: more than two columns are shown in one row per case; else a slider between two that are chosen.
    right: the column that the first is held against until another is chosen; the last where it is None.
    """

    columns: list[str]
    measures: list[str]
    cases: list[Case]
    title: str = "Pictures"
    row: bool = False
    right: int | None = None


@dataclass(frozen=True)
class Report:
    """Attributes:
    verdict: said first, a few sentences.
    blocks: in order.
    settings, machine: facts as (name, value).
    repeat: commands that repeat it.
    refresh: seconds after which an open page reads its file again; 0 is never.
    pictures_first: the gallery stands above the blocks; for few pictures, since more come while one scrolls.
    """

    title: str
    subtitle: str
    verdict: list[str]
    blocks: list[Chart | Forest | Table]
    gallery: Gallery | None = None
    settings: list[tuple[str, str]] = field(default_factory=list)
    machine: list[tuple[str, str]] = field(default_factory=list)
    repeat: list[str] = field(default_factory=list)
    refresh: int = 0
    pictures_first: bool = False
