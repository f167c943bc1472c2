"""Prompts in tables: CSV, TSV, parquet, and rows of JSON; torch-free."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sdo_cli.installed import install_extra
from sdo_cli.prompt_sets.entries import DELIMITERS, FOUND, PROMPT_COLUMNS, Columns, Prompt, lines_of, read_text

# columns that hold categories, in the order they are looked for, any case
CATEGORY_COLUMNS = ("category", "categories", "tag", "style", "class")
# columns a picture may be called by
NAME_COLUMNS = (
    "id", "prompt_id", "image_id", "item_id", "image id", "name", "file_name", "filename", "image_name", "image", "img",
    "file", "key", "number", "idx", "index",
)  # fmt: skip
PICTURE = re.compile(r"[^\n]*\.(?:png|jpe?g|jpe|jfif|webp|bmp|tiff?)", re.IGNORECASE)


def read_table(path: Path, columns: Columns = FOUND) -> list[dict[str, Any]]:
    """Rows of a CSV, TSV or parquet file, by the names of its columns.

    Raises:
        ValueError: one sentence with the reason.
    """
    return _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path, read_text(path), columns)


def from_rows(path: Path, rows: list[dict[str, Any]], columns: Columns, notes: list[str]) -> Iterator[Prompt]:
    """A prompt a row, with its category, names and picture; raises ValueError without a column of prompts."""
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    texts = _choose(path, names, columns.prompt, PROMPT_COLUMNS, columns.prompt_key)
    if texts is None:
        raise ValueError(
            f"{path} has no column of prompts among {', '.join(names)}; name one with {columns.prompt_key}"
        )
    categories = _choose(path, names, columns.category, CATEGORY_COLUMNS, columns.category_key)
    called = [name for word in NAME_COLUMNS for name in names if name.lower().strip() == word and name != texts]
    pictured = next((name for name in names if name != texts and _names_pictures(rows, name)), None)
    # rows of JSON may call the same thing by two names
    usual = () if columns.prompt is not None else [n for w in PROMPT_COLUMNS for n in names if n.lower() == w]
    other: Counter[str] = Counter()
    without = 0
    for row in rows:
        key = texts if texts in row else next((name for name in usual if name in row), texts)
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            without += 1
            continue
        if key != texts:
            other[key] += 1
        category = row.get(categories) if categories is not None else None
        extra = {name: value for name, value in row.items() if name not in (key, categories)}
        own = tuple("" if row.get(column) is None else str(row[column]) for column in called if column != pictured)
        picture = "" if pictured is None else str(row.get(pictured) or "").strip()
        yield Prompt(text.strip(), str(category).strip() if category is not None else "", extra, own, picture)
    if without == len(rows) and rows:
        raise ValueError(
            f"{path}: column {texts} is empty in all {len(rows)} rows; name another with {columns.prompt_key}"
        )
    if without:
        notes.append(f"{path}: {without} of {len(rows)} rows have no {texts} and are left out")
    notes.extend(
        f"{path}: {count} of {len(rows)} rows call the prompt {key}, not {texts}" for key, count in other.items()
    )


def _names_pictures(rows: list[dict[str, Any]], column: str) -> bool:
    """Whether every value of a column is a picture's file."""
    values = [row[column] for row in rows if row.get(column) not in (None, "")]
    return bool(values) and all(isinstance(value, str) and PICTURE.fullmatch(value.strip()) for value in values)


def _choose(path: Path, names: list[str], asked: str | None, usual: tuple[str, ...], option: str) -> str | None:
    if asked is not None:
        same = [name for name in names if name == asked] or [n for n in names if n.lower() == asked.lower()]
        if not same:
            raise ValueError(
                f"{path} has no column {asked.strip() or repr(asked)} for {option}; there are {', '.join(names)}"
            )
        return same[0]
    return next((name for word in usual for name in names if name.lower().strip() == word), None)


def _csv(path: Path, text: str, columns: Columns) -> list[dict[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text, columns)
    quoted: Literal[0, 3] = csv.QUOTE_MINIMAL
    # TSV files of the field quote nothing, and their prompts hold quotation marks
    if delimiter == "\t" and not _quotes(text):
        quoted = csv.QUOTE_NONE
    lines = _cut(path, text, delimiter, quoted)
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise ValueError(f"{path} has {header.count(twice)} columns named {twice}; give each a name of its own")
    for number, row in enumerate(lines[1:], 2):
        if len(row) > len(header):
            hold = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, delimiter)
            raise ValueError(f"{path}: row {number} has more cells than the header; quote cells that hold {hold}")
    return [dict(zip(header, row + [None] * (len(header) - len(row)), strict=True)) for row in lines[1:]]


def _cut(path: Path, text: str, delimiter: str, quoted: Literal[0, 3]) -> list[list[str]]:
    """Rows of cells without empty ones; an unbalanced quotation mark would make one cell of many rows."""
    # strict: a mark has to end its cell, and the last one its file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoted, strict=True)
    rows, begins, start = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                begins.append(start)
            start = reader.line_num + 1
    except csv.Error as fault:
        if "expected after" in str(fault) or "unexpected end" in str(fault):
            raise ValueError(_unbalanced(path, start)) from None
        raise ValueError(f"{path} is no readable table: {fault}") from None
    last = Counter(row[-1].strip() for row in rows[1:] if not any("\n" in cell for cell in row))
    for row, line in zip(rows, begins, strict=True):
        if any("\n" in cell and _swallows(cell, k, len(rows[0]), delimiter, last) for k, cell in enumerate(row)):
            raise ValueError(_unbalanced(path, line))
    return rows


def _unbalanced(path: Path, line: int) -> str:
    return (
        f"{path}:{line} begins a quoted cell that takes in more than its own, or goes on after its mark; close it, and "
        'double marks inside it ("")'
    )


def _swallows(cell: str, before: int, width: int, delimiter: str, last: Mapping[str, int]) -> bool:
    """Whether lines inside a cell look like whole rows: cut close, as no prose is, or ending in a known last cell."""
    if width < 2:
        return False
    for k, line in enumerate(cell.split("\n")[:-1]):
        cells = line.split(delimiter)
        if len(cells) < 2 or len(cells) + (before if k == 0 else 0) != width:
            continue
        # 1,000 is a number
        close = all(
            after[:1].strip() and not (ahead[-1:].isdecimal() and after[:1].isdecimal())
            for ahead, after in pairwise(cells)
        )
        if close or (cells[-1].strip() and cells[-1].strip() in last):
            return True
    return False


def _delimiter(text: str, columns: Columns) -> str:
    """The one that cuts a column out of the header whose name is known; else the one that cuts most."""
    first = text.partition("\n")[0]
    cut = {d: next(csv.reader([first], delimiter=d), []) for d in DELIMITERS}
    asked = {name.lower() for name in (columns.prompt, columns.category) if name is not None}
    known = [d for d in DELIMITERS if {name.strip().lower() for name in cut[d]} & (asked or set(PROMPT_COLUMNS))]
    return max(known or DELIMITERS, key=lambda d: len(cut[d]))


def _quotes(text: str) -> bool:
    """Whether a table with tabs was written with quotation marks around cells.

    Writers quote a cell that holds a tab, a line end or a mark, which is doubled, or every cell, the header's too.
    """
    lines = [line.rstrip("\r") for line in lines_of(text) if line.strip()]
    if lines and all(re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in lines[0].split("\t")):
        return True
    plain = [line.split("\t") for line in lines]
    # some quote what a file with commas would have to
    whole = [re.fullmatch(r'"[^"]*"', cell) is not None for row in plain for cell in row]
    comma = ["," in cell for row in plain for cell in row]
    if any(comma) and whole == comma:
        return True
    if any(re.fullmatch(r'"(?:[^"]|"")*""(?:[^"]|"")*"', cell) for row in plain for cell in row):
        return True
    if len({len(row) for row in plain}) <= 1:
        return False
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if row]
    return len({len(row) for row in rows}) == 1


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow; {install_extra('parquet')}") from None
    try:
        table = parquet.ParquetFile(path)
        # pictures beside the prompts are not read
        names = [field.name for field in table.schema_arrow if not str(field.type).startswith(("binary", "struct"))]
        return list(table.read(columns=names).to_pylist())
    # pyarrow has many errors of its own
    except Exception as fault:
        raise ValueError(f"{path} is no readable parquet file: {str(fault).splitlines()[0]}") from None
