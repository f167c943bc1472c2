"""Reads prompts from the file formats people have; torch-free."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, Literal

from sdo_cli.installed import install_extra

# columns that hold prompts and categories, in the order they are looked for, any case
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text", "description")
CATEGORY_COLUMNS = ("category", "categories", "tag", "style", "class")
# columns a picture may be called by
NAME_COLUMNS = (
    "id", "prompt_id", "image_id", "item_id", "image id", "name", "file_name", "filename", "image_name", "image", "img",
    "file", "key", "number", "idx", "index",
)  # fmt: skip
PICTURE = re.compile(r"[^\n]*\.(?:png|jpe?g|jpe|jfif|webp|bmp|tiff?)", re.IGNORECASE)
DELIMITERS = (",", ";", "\t", "|")
# what an object of JSON says of itself, beside its prompts
ABOUT = (
    "author", "comment", "created", "date", "description", "id", "info", "lang", "language", "licence", "license",
    "name", "note", "notes", "source", "title", "type", "url", "version", "$schema",
)  # fmt: skip
# a line of A1111's "Prompts from file"
SCRIPT = re.compile(r"(?:^|\s)--(?:prompt|negative_prompt)\s|^--[a-z_]+\s")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    text: what is drawn.
    category: empty where the source has none.
    extra: the other columns of the source.
    names: by which its pictures may be called: its own file in a folder of prompts, or a place for each column of ids
        and names, empty where the row has none.
    picture: the file of its picture, where a column says so.
    """

    text: str
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = field(default=(), compare=False)
    picture: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, and where they came from: a path, ``shipped:NAME`` or ``hub:owner/name@revision/file``.

    ``notes`` are sentences on what was left out.
    """

    name: str
    source: str
    prompts: list[Prompt]
    notes: list[str] = field(default_factory=list)

    @property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over texts and categories, in order."""
        content = json.dumps([[prompt.text, prompt.category] for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Columns:
    """Those asked for, and what the asker calls them; None finds one."""

    prompt: str | None = None
    category: str | None = None
    prompt_key: str = "--column"
    category_key: str = "--category-column"


def read_path(path: Path, *, column: str | None = None, category_column: str | None = None) -> list[Prompt]:
    """The prompts of a file, or of every file in a folder; see :func:`read_noted`."""
    return read_noted(path, Columns(column, category_column))[0]


def read_noted(path: Path, columns: Columns = Columns()) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, or of every file in a folder, and sentences on what was left out.

    In a folder, text files of one prompt each name it (DPG-Bench); else files are categories (HPSv2).

    Raises:
        ValueError: one sentence with the reason.
    """
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), key=_natural)
        if not files:
            raise ValueError(f"{path} holds no prompt file ({', '.join(SUFFIXES)})")
        parts = [(file.name, *read_noted(file, columns)) for file in files]
        return together([(name, prompts) for name, prompts, _ in parts]), [n for *_, notes in parts for n in notes]
    notes: list[str] = []
    prompts = list(_rows(path, columns, notes))
    if not prompts:
        raise ValueError(f"{path} gives no prompt at all; put at least one in")
    return prompts, notes


def together(parts: list[tuple[str, list[Prompt]]]) -> list[Prompt]:
    """Prompts of several files, by name, with the files' stems as their names or categories."""
    if all(len(prompts) == 1 and file.lower().endswith(".txt") for file, prompts in parts):
        return [replace(prompts[0], names=(PurePath(file).stem,)) for file, prompts in parts]
    return [p if p.category else replace(p, category=PurePath(file).stem) for file, prompts in parts for p in prompts]


def _natural(path: Path) -> list[tuple[int, str]]:
    """``2.txt`` before ``10.txt``."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts] + [(-1, path.name)]


def _rows(path: Path, columns: Columns, notes: list[str]) -> Iterator[Prompt]:
    kind = path.suffix.lower()
    if kind not in (*SUFFIXES, ""):
        raise ValueError(f"{path}: sdo reads no prompts from {kind} files; save them as one of {', '.join(SUFFIXES)}")
    if kind in (".parquet", ".csv", ".tsv"):
        yield from _from_table(path, read_table(path, columns), columns, notes)
        return
    text = read_text(path)
    if kind in (".jsonl", ".ndjson"):
        yield from _from_values(path, _json_lines(path, text), columns, notes)
    elif kind == ".json":
        yield from _from_values(path, _json_list(path, text, columns, notes), columns, notes)
    elif columns.prompt is not None:
        raise ValueError(f"{path} is plain text, a prompt a line: it has no column {columns.prompt}")
    else:
        yield from _from_lines(path, [line.strip() for line in lines_of(text)], notes)


def _from_lines(path: Path, lines: list[str], notes: list[str]) -> Iterator[Prompt]:
    """A prompt a line; ``#`` alone or before a space begins a comment. Those above the first prompt are not counted."""
    _only_prompts(path, lines)
    texts = [line for line in lines if line and not re.match(r"#+(?:\s|$)", line)]
    first = next((k for k, line in enumerate(lines) if texts and line == texts[0]), 0)
    if inside := [line for line in lines[first:] if re.match(r"#+(?:\s|$)", line)]:
        notes.append(
            f"{path}: {len(inside)} lines among the prompts are comments, left out; the first: {inside[0][:60]}"
        )
    if tagged := [line for line in texts if line.startswith("#")]:
        notes.append(
            f"{path}: {len(tagged)} lines begin with # but no space and are prompts; the first: {tagged[0][:60]}"
        )
    yield from (Prompt(text) for text in texts)


def _only_prompts(path: Path, lines: list[str]) -> None:
    """Refuses what another program reads otherwise: tables, JSON and A1111's scripts saved as text."""
    held = [line for line in lines if line]
    for number, line in enumerate(lines, 1):
        if "\ufeff" in line:
            raise ValueError(
                f"{path}:{number} holds a byte-order mark: two files were joined there; end the line before it"
            )
        if SCRIPT.search(line):
            raise ValueError(f"{path}:{number} is a line with options for another program; write its prompt alone")
    for mark in DELIMITERS:
        cells = [cell.strip().strip('"').lower() for cell in held[0].split(mark)] if held else []
        if len(cells) > 1 and set(cells) & set(PROMPT_COLUMNS) and all(mark in line for line in held):
            raise ValueError(f"{path} begins like a table, {held[0][:60]}; call it .csv or .tsv")
    if held and (_is_json(held[0]) or _is_json("\n".join(held))):
        raise ValueError(f"{path} holds JSON; call it .json, or .jsonl where each line is an object")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (json.JSONDecodeError, RecursionError):
        return False


def read_table(path: Path, columns: Columns = Columns()) -> list[dict[str, Any]]:
    """Rows of a CSV, TSV or parquet file, by the names of its columns.

    Raises:
        ValueError: one sentence with the reason.
    """
    return _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path, read_text(path), columns)


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte-order mark, also where files were joined; raises ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig").replace("\n\ufeff", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as fault:
        raise ValueError(f"{path} cannot be read: {fault.strerror}") from None


def lines_of(text: str) -> list[str]:
    """At line ends only: JSON may hold U+2028 and its like as they are, which ``splitlines`` takes for ends, too."""
    return text.split("\n")


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as fault:
            raise ValueError(f"{path}:{number} is not JSON: {fault.msg}") from None


def _json_list(path: Path, text: str, columns: Columns, notes: list[str]) -> list[Any]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path}:{fault.lineno} is not JSON: {fault.msg}") from None
    if isinstance(tree, dict):
        return _from_object(path, tree, columns, notes)
    if not isinstance(tree, list):
        raise ValueError(f"{path} is neither a list of prompts nor lists by category")
    return tree


def _from_object(path: Path, tree: dict[str, Any], columns: Columns, notes: list[str]) -> list[Any]:
    """Lists by column, a table under one name, one prompt with what belongs to it, or lists by category."""

    def is_prompt(key: str) -> bool:
        return key == columns.prompt or (columns.prompt is None and key.lower() in PROMPT_COLUMNS)

    lists = {key: value for key, value in tree.items() if isinstance(value, list)}
    tables = [key for key, rows in lists.items() if rows and all(isinstance(row, dict) for row in rows)]
    usual = [key for key in lists if is_prompt(key)]
    # a set may describe itself, which is no prompt
    texts = [key for key, value in tree.items() if isinstance(value, str) and is_prompt(key)]
    single = [key for key in texts if key == columns.prompt or key.lower() in ("prompt", "caption", "text")]
    if len(usual) == 1 and usual[0] in tables:
        tables = usual
    elif usual and not single:
        return lists[usual[0]] if len(lists) == 1 else _by_column(path, lists, usual[0], notes)
    elif single and not usual and not tables:
        _unread(path, list(lists), notes, f"beside {single[0]}")
        return [tree]
    if single or (texts and not tables and not lists):
        raise ValueError(
            f"{path}: which of {', '.join(dict.fromkeys([*texts, *lists]))} holds the prompts is not clear; make it a "
            "list of objects with prompt and category"
        )
    if len(tables) == 1:
        # a table stored under one name
        _unread(path, [key for key in lists if key != tables[0]], notes, f"beside {tables[0]}")
        return lists[tables[0]]
    if tables and len(tables) == len(lists):
        return [{"category": key, **row} for key, rows in lists.items() for row in rows]
    return _by_category(path, tree, lists, notes)


def _by_category(path: Path, tree: dict[str, Any], lists: dict[str, list[Any]], notes: list[str]) -> list[Any]:
    """Texts under their categories; the one list there is has none."""
    if odd := next((k for k, v in tree.items() if isinstance(v, str) and k.lower() not in ABOUT), None):
        raise ValueError(f"{path}: {odd} is a text beside lists; make it a list of prompts, too, or leave it out")
    negative = [key for key in lists if "negative" in key.lower()]
    kept = {key: texts for key, texts in lists.items() if key not in negative}
    _unread(path, negative, notes, "as prompts: it says what not to draw")
    if len(kept) == 1:
        return next(iter(kept.values()))
    return [{"prompt": text, "category": key} for key, texts in kept.items() for text in texts]


def _unread(path: Path, keys: list[str], notes: list[str], why: str) -> None:
    if keys:
        notes.append(f"{path}: {', '.join(keys)} is not read {why}")


def _by_column(path: Path, lists: dict[str, list[Any]], key: str, notes: list[str]) -> list[dict[str, Any]]:
    """A list per column; those of another length, or of negative prompts, belong to no prompt."""
    others = [name for name in lists if name != key]
    kept = [name for name in others if len(lists[name]) == len(lists[key]) and "negative" not in name.lower()]
    _unread(path, [name for name in others if name not in kept], notes, f"beside {key}")
    return [{key: text, **{name: lists[name][row] for name in kept}} for row, text in enumerate(lists[key])]


def _from_values(path: Path, values: Any, columns: Columns, notes: list[str]) -> Iterator[Prompt]:
    values = list(values)
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) == len(values):
        if columns.prompt is not None:
            raise ValueError(f"{path} is a list of prompts: it has no column {columns.prompt}")
        yield from (Prompt(text.strip()) for text in texts if text.strip())
        return
    wrong = next((number for number, value in enumerate(values, 1) if not isinstance(value, dict)), None)
    if wrong is not None:
        raise ValueError(f"{path}: entry {wrong} is neither text nor an object like the others")
    yield from _from_table(path, values, columns, notes)


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


def _from_table(path: Path, rows: list[dict[str, Any]], columns: Columns, notes: list[str]) -> Iterator[Prompt]:
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
