"""Charts as inline SVG, coloured by the page's style so that light and dark both work."""

import math
from collections.abc import Iterable
from itertools import groupby

from markupsafe import Markup, escape

from sdo_cli.reports.content import Chart, Forest, Series

# units are pixels where a drawing has its own width; a phone gets one of its own, so that words stay words
WIDTH, NARROW, HEIGHT = 720, 340, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
# the widest digit of a tick
DIGIT = 8
# a line of more points than this is thinned: the screen has no more pixels
MOST_POINTS = 700
COLOURS = 6


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from the one below ``low`` to the one above ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}" if digits < 7 else f"{value:.1e}"


def thinned(series: Series) -> list[int]:
    """Indices to draw: all, or evenly chosen ones with the last."""
    n = len(series.x)
    stride = max(1, math.ceil(n / MOST_POINTS))
    kept = list(range(0, n, stride))
    return kept if not n or kept[-1] == n - 1 else [*kept, n - 1]


class _Axis:
    """From data to pixels along one side."""

    def __init__(self, values: list[float], start: float, end: float, count: int) -> None:
        self.ticks = ticks(min(values, default=0.0), max(values, default=1.0), count)
        self.low, self.high, self.start, self.end = self.ticks[0], self.ticks[-1], start, end

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def label(self, value: float) -> str:
        return tick_text(value, self.ticks[1] - self.ticks[0])


def line_chart(chart: Chart, width: int = WIDTH) -> Markup:
    """Lines with bands, or points with error bars."""
    xs = [x for s in chart.series for x in finite(s.x)]
    ys = [v for s in chart.series for v in finite([*s.y, *(s.low or []), *(s.high or [])])]
    x, y = _Axis(xs, LEFT, width - RIGHT, 8 * width // WIDTH), _Axis(ys, HEIGHT - BOTTOM, TOP, 5)
    parts = [_frame(x, y, chart.x_label, chart.y_label, width)]
    for number, series in enumerate(chart.series):
        colour = f"c{number % COLOURS}{' pale' if series.pale else ''}"
        kept = thinned(series)
        points = chart.markers or series.points
        if points:
            parts += [_marker(x, y, series, i, colour) for i in kept if finite([series.y[i]])]
        elif series.low and series.high:
            parts += [_band(x, y, series, run, colour) for run in _runs(kept, series.low, series.high)]
        for run in _runs(kept, series.y):
            corners = " ".join(f"{x(series.x[i])},{y(series.y[i] or 0.0)}" for i in run)
            if len(run) == 1 and not points:
                cx, cy = corners.split(",")
                parts.append(f'<circle class="dot {colour}" cx="{cx}" cy="{cy}" r="3"/>')
            elif len(run) > 1:
                parts.append(f'<polyline class="line {colour}" points="{corners}"/>')
    return _svg(chart.title, f"{chart.y_label} by {chart.x_label}", width, HEIGHT, parts)


def _runs(kept: list[int], *columns: list[float | None]) -> list[list[int]]:
    """Stretches without gaps."""
    whole = [(i, all(finite([column[i]]) for column in columns)) for i in kept]
    return [[i for i, _ in run] for there, run in groupby(whole, key=lambda pair: pair[1]) if there]


def _band(x: _Axis, y: _Axis, series: Series, run: list[int], colour: str) -> str:
    assert series.low is not None and series.high is not None
    upper = [f"{x(series.x[i])},{y(series.high[i] or 0.0)}" for i in run]
    lower = [f"{x(series.x[i])},{y(series.low[i] or 0.0)}" for i in reversed(run)]
    return f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>'


def _marker(x: _Axis, y: _Axis, series: Series, i: int, colour: str) -> str:
    at = x(series.x[i])
    text = f'<circle class="dot {colour}" cx="{at}" cy="{y(series.y[i] or 0.0)}" r="4"/>'
    if series.low and series.high and finite([series.low[i], series.high[i]]):
        text += f'<path class="bar {colour}" d="M{at} {y(series.low[i] or 0.0)}V{y(series.high[i] or 0.0)}"/>'
    return text


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str, width: int) -> str:
    rows = [
        f'<path class="grid" d="M{LEFT} {y(v)}H{width - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y(v) + 4}" text-anchor="end">{y.label(v)}</text>'
        for v in y.ticks
    ]
    columns = [
        f'<text class="tick" x="{_within(x(v), x.label(v), width)}" y="{HEIGHT - BOTTOM + 18}" '
        f'text-anchor="middle">{x.label(v)}</text>'
        for v in x.ticks
    ]
    middle = (LEFT + width - RIGHT) / 2
    labels = (
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(rows + columns) + labels


def forest_chart(forest: Forest, width: int = WIDTH) -> Markup:
    """A row per interval, its mean as a dot, a line at zero."""
    left, letters, count = (190, 26, 6) if width == WIDTH else (136, 15, 3)
    row_height, top = 24, 10
    ends = [v for row in forest.rows for v in (row.interval.mean, row.interval.low, row.interval.high)]
    zero = [] if forest.zero is None else [forest.zero]
    groups = [(name, list(rows)) for name, rows in groupby(forest.rows, key=lambda row: row.group)]
    titled = [name for name, _ in groups if name]
    bottom = top + row_height * (len(forest.rows) + len(titled))
    x = _Axis(finite([*ends, *zero]), left, width - RIGHT, count)
    parts = [
        f'<path class="grid" d="M{x(v)} {top}V{bottom}"/>'
        f'<text class="tick" x="{_within(x(v), x.label(v), width)}" y="{bottom + 16}" '
        f'text-anchor="middle">{x.label(v)}</text>'
        for v in x.ticks
    ]
    parts += [f'<path class="zero" d="M{x(v)} {top}V{bottom}"/>' for v in zero]
    at, number = float(top), -1
    for name, rows in groups:
        number += 1
        if name:
            parts.append(f'<text class="group" x="4" y="{at + 16}">{escape(_short(name, width // 8))}</text>')
            at += row_height
        for row in rows:
            middle, span = at + row_height / 2, row.interval
            label = f"<title>{escape(row.label)}</title>{escape(_short(row.label, letters))}"
            parts.append(f'<text class="row" x="{left - 10}" y="{middle + 4}" text-anchor="end">{label}</text>')
            if finite([span.low, span.high]):
                line = f"M{x(span.low)} {middle}H{x(span.high)}"
                parts.append(f'<path class="bar c{number % COLOURS}" d="{line}"/>')
            if finite([span.mean]):
                dot = f'cx="{x(span.mean)}" cy="{middle}"'
                parts.append(f'<circle class="dot c{number % COLOURS}" {dot} r="4"/>')
            at += row_height
    middle = (left + width - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(forest.x_label)}</text>'
    )
    return _svg(forest.title, f"intervals of {forest.x_label}", width, bottom + 44, parts)


def _within(middle: float, text: str, width: int) -> float:
    """Where a number's middle stands so that its last digit is not cut off at the edge."""
    return round(min(middle, width - 1 - DIGIT * len(text) / 2), 2)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(title: str, description: str, width: int, height: float, parts: list[str]) -> Markup:
    # the parts escape every text of others themselves
    return Markup(
        f'<svg class="{"wide" if width == WIDTH else "narrow"}" viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(map(str, parts))}</svg>"
    )


def numbers_of(block: Chart | Forest) -> tuple[list[str], list[list[str]]]:
    """The chart as a table, for those who read rather than look."""
    if isinstance(block, Forest):
        rows = [
            [r.group, r.label, *map(_number, (r.interval.mean, r.interval.low, r.interval.high))] for r in block.rows
        ]
        return ["of", "", "mean", "low", "high"], rows
    rows = []
    for series in block.series:
        for i in thinned(series):
            ends = [column[i] if column else None for column in (series.low, series.high)]
            rows.append([series.name, f"{series.x[i]:g}", *map(_number, (series.y[i], *ends))])
    return ["", block.x_label, block.y_label, "low", "high"], rows


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.5g}"
