"""One picture of many: rows and columns of pictures under named heads, words as large as the pictures ask for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdo_cli.files import write_atomic

# pixels: the longest side of a sheet and its area; pictures are made smaller until it fits
MOST_SIDE, MOST_AREA = 8192, 40_000_000
# small pictures are enlarged to this, and none is made smaller than words beside it can be read
LEAST_CELL, LEAST_WORDS, MOST_WORDS = 192, 13, 72
# of the shorter side of a cell, for letters
WORDS = 0.062
HEAD_LINES, TITLE_LINES, ROW_LINES = 4, 3, 8
INK, SOFT, PAPER = "#1d2327", "#565f66", "#ffffff"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Words:
    """Attributes:
    title: what all pictures share.
    rows, columns: heads; empty ones take no room.
    """

    title: str
    rows: list[str]
    columns: list[str]


@cache
def font_of(size: int) -> Font:
    """DejaVu, which matplotlib brings, else what Pillow has."""
    found = find_spec("matplotlib")
    place = (
        Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if found and found.origin else None
    )
    return (
        ImageFont.truetype(str(place), size) if place is not None and place.is_file() else ImageFont.load_default(size)
    )


def wrapped(text: str, width: float, most: int, measure: Callable[[str], float]) -> list[str]:
    """At most so many lines no wider than ``width``; of what does not fit the middle is left out.

    Both ends are kept: names of LoRAs begin alike, and prompts of one set end alike.
    """
    text = " ".join(text.split())
    lines = _lines(text, width, measure)
    kept = len(text)
    while len(lines) > most and kept > 2:
        # a tenth at a time: the room that words leave is not known before
        kept -= max(1, kept // 10)
        head = (kept + 1) // 2
        lines = _lines(f"{text[:head].rstrip()}…{text[len(text) - (kept - head) :].lstrip()}", width, measure)
    return lines[:most]


def _lines(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Broken between words, behind signs within names, or where it has to be."""
    lines = [""]
    for piece in re.findall(r"\s+|[^\s\-_/+.,]+[\-_/+.,]*|[\-_/+.,]+", text):
        if measure(lines[-1] + piece.rstrip()) <= width:
            lines[-1] += piece
            continue
        rest = piece.strip()
        if lines[-1].strip():
            lines.append("")
        while rest and measure(rest) > width:
            count = max(1, next((n for n in range(len(rest), 0, -1) if measure(rest[:n]) <= width), 1))
            lines[-1], rest = rest[:count], rest[count:]
            lines.append("")
        lines[-1] += rest
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class _Plan:
    """Where everything stands at one size of the pictures."""

    cell: tuple[int, int]
    letters: int
    title: list[str]
    rows: list[list[str]]
    columns: list[list[str]]
    left: int
    top: int
    size: tuple[int, int]

    @property
    def gap(self) -> int:
        return gap_of(self.letters)

    @property
    def line(self) -> int:
        return line_of(self.letters)


def gap_of(letters: int) -> int:
    return max(4, letters // 3)


def line_of(letters: int) -> int:
    return round(1.3 * letters)


def _plan(words: Words, picture: tuple[int, int], factor: float) -> _Plan:
    width, height = (max(1, round(side * factor)) for side in picture)
    # of many columns a whole sheet is looked at from further away
    wanted = max(WORDS, min(0.1, len(words.columns) * width / min(width, height) / 150)) * min(width, height)
    letters = min(MOST_WORDS, max(LEAST_WORDS, round(wanted)))
    font, gap, line = font_of(letters), gap_of(letters), line_of(letters)

    def measure(text: str) -> float:
        return font.getlength(text)

    room = max(0.9 * width, 9 * letters)
    rows = [wrapped(text, room, max(1, min(ROW_LINES, height // line)), measure) for text in words.rows]
    columns = [wrapped(text, width, HEAD_LINES, measure) for text in words.columns]
    widest = max((measure(text) for lines in rows for text in lines), default=0.0)
    left = gap + (round(widest) + 2 * gap if widest else 0)
    whole = left + len(columns) * (width + gap)
    title = wrapped(words.title, max(whole - 2 * gap, 20 * letters), TITLE_LINES, measure) if words.title else []
    whole = max(whole, round(max((measure(text) for text in title), default=0.0)) + 2 * gap)
    heads = max((len(lines) for lines in columns), default=0)
    top = gap + (len(title) * line + gap if title else 0) + (heads * line + gap if heads else 0)
    return _Plan((width, height), letters, title, rows, columns, left, top, (whole, top + len(rows) * (height + gap)))


def _fitting(words: Words, picture: tuple[int, int]) -> _Plan:
    factor = max(1.0, -(-LEAST_CELL // min(picture)))
    while True:
        plan = _plan(words, picture, factor)
        if (max(plan.size) <= MOST_SIDE and plan.size[0] * plan.size[1] <= MOST_AREA) or max(plan.cell) <= 32:
            return plan
        factor *= 0.95


def write_sheet(words: Words, files: Sequence[Sequence[Path]], path: Path) -> None:
    """Write the sheet of picture files, by row and column; all are of one size, and that of the first."""
    with Image.open(files[0][0]) as first:
        plan = _fitting(words, first.size)
    sheet = Image.new("RGB", plan.size, PAPER)
    pen, font = ImageDraw.Draw(sheet), font_of(plan.letters)
    for number, text in enumerate(plan.title):
        pen.text((plan.gap, plan.gap + number * plan.line), text, fill=SOFT, font=font)
    for number, lines in enumerate(plan.columns):
        _head(pen, font, lines, plan, number)
    for r, (row, lines) in enumerate(zip(files, plan.rows, strict=True)):
        at = plan.top + r * (plan.cell[1] + plan.gap)
        _beside(pen, font, lines, plan, at)
        for c, file in enumerate(row):
            with Image.open(file) as image:
                tile = image.convert("RGB")
                if tile.size != plan.cell:
                    tile = tile.resize(plan.cell, Image.Resampling.LANCZOS)
            sheet.paste(tile, (plan.left + c * (plan.cell[0] + plan.gap), at))
    write_atomic(path, sheet.save)


def _head(pen: ImageDraw.ImageDraw, font: Font, lines: list[str], plan: _Plan, number: int) -> None:
    """Above its column, in the middle, standing on the pictures."""
    middle = plan.left + number * (plan.cell[0] + plan.gap) + plan.cell[0] / 2
    for n, text in enumerate(lines):
        at = plan.top - plan.gap - (len(lines) - n) * plan.line
        pen.text((middle - font.getlength(text) / 2, at), text, fill=INK, font=font)


def _beside(pen: ImageDraw.ImageDraw, font: Font, lines: list[str], plan: _Plan, top: int) -> None:
    """Left of its row, at half height."""
    at = top + (plan.cell[1] - len(lines) * plan.line) / 2
    for n, text in enumerate(lines):
        right = plan.left - 2 * plan.gap - font.getlength(text)
        pen.text((right, at + n * plan.line), text, fill=INK, font=font)
