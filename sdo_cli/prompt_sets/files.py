"""Reads prompts from the file formats people have; torch-free."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdo_cli.installed import install_extra

# columns that hold prompts and categories, in the order they are looked for, any case
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text", "description")
CATEGORY_COLUMNS = ("category", "categories", "tag", "style", "class")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    text: what is drawn.
    category: empty where the source has none.
    extra: the other columns of the source.
    """

    text: str
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, and where they came from: a path, ``shipped:NAME`` or ``hub:owner/name@revision/file``."""

    name: str
    source: str
    prompts: list[Prompt]

    @property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over texts and categories, in order."""
        content = json.dumps([[prompt.text, prompt.category] for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def read_path(path: Path, *, column: str | None = None, category_column: str | None = None) -> list[Prompt]:
    """The prompts of a file, or of every file in a folder, whose names are then the categories.

    Raises:
        ValueError: one sentence with the reason.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no prompt file ({', '.join(SUFFIXES)})")
        found = []
        for file in files:
            for prompt in read_path(file, column=column, category_column=category_column):
                found.append(prompt if prompt.category else Prompt(prompt.text, file.stem, prompt.extra))
        return found
    prompts = list(_rows(path, column, category_column))
    if not prompts:
        raise ValueError(f"{path} gives no prompt at all; put at least one in")
    return prompts


def _rows(path: Path, column: str | None, category_column: str | None) -> Iterator[Prompt]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _from_table(path, _parquet(path), column, category_column)
        return
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        yield from _from_table(path, _csv(path, text), column, category_column)
    elif kind in (".jsonl", ".ndjson"):
        yield from _from_values(path, _json_lines(path, text), column, category_column)
    elif kind == ".json":
        yield from _from_values(path, _json_list(path, text), column, category_column)
    elif column is not None:
        raise ValueError(f"{path} is plain text, a prompt a line: it has no column {column}")
    else:
        lines = (line.strip() for line in lines_of(text))
        yield from (Prompt(line) for line in lines if line and not line.startswith("#"))


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte-order mark; raises ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig")
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


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path}:{fault.lineno} is not JSON: {fault.msg}") from None
    if isinstance(tree, dict):
        # a table stored under one name, or lists by category
        lists = {key: value for key, value in tree.items() if isinstance(value, list)}
        if len(lists) == 1:
            return next(iter(lists.values()))
        return [{"prompt": text, "category": key} for key, texts in lists.items() for text in texts]
    if not isinstance(tree, list):
        raise ValueError(f"{path} is neither a list of prompts nor lists by category")
    return tree


def _from_values(path: Path, values: Any, column: str | None, category_column: str | None) -> Iterator[Prompt]:
    values = list(values)
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) == len(values):
        if column is not None:
            raise ValueError(f"{path} is a list of prompts: it has no column {column}")
        yield from (Prompt(text.strip()) for text in texts if text.strip())
        return
    wrong = next((number for number, value in enumerate(values, 1) if not isinstance(value, dict)), None)
    if wrong is not None:
        raise ValueError(f"{path}: entry {wrong} is neither text nor an object like the others")
    yield from _from_table(path, values, column, category_column)


def _csv(path: Path, text: str) -> list[dict[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0] else ","
    # quoted cells may hold line breaks; TSV files of the field quote nothing
    quoted: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoted))
    except csv.Error as fault:
        raise ValueError(f"{path} is no readable table: {fault}") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{path}: row {number} has more cells than the header; quote cells that hold commas")
    return rows


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


def _from_table(
    path: Path, rows: list[dict[str, Any]], column: str | None, category_column: str | None
) -> Iterator[Prompt]:
    names = list(dict.fromkeys(str(name) for row in rows[:100] for name in row))
    texts = _choose(path, names, column, PROMPT_COLUMNS, "--column")
    if texts is None:
        raise ValueError(f"{path} has no column of prompts among {', '.join(names)}; name one with --column")
    categories = _choose(path, names, category_column, CATEGORY_COLUMNS, "--category-column")
    for row in rows:
        text = row.get(texts)
        if isinstance(text, str) and text.strip():
            category = row.get(categories) if categories is not None else None
            extra = {key: value for key, value in row.items() if key not in (texts, categories)}
            yield Prompt(text.strip(), str(category).strip() if category is not None else "", extra)


def _choose(path: Path, names: list[str], asked: str | None, usual: tuple[str, ...], option: str) -> str | None:
    if asked is not None:
        same = [name for name in names if name == asked] or [n for n in names if n.lower() == asked.lower()]
        if not same:
            raise ValueError(f"{path} has no column {asked} for {option}; there are {', '.join(names)}")
        return same[0]
    return next((name for word in usual for name in names if name.lower().strip() == word), None)
