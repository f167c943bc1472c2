"""Reads prompts from the file formats people have; torch-free."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath

from sdo_cli.prompt_sets.entries import FOUND, Columns, Prompt, lines_of, read_text
from sdo_cli.prompt_sets.tables import from_rows, read_table
from sdo_cli.prompt_sets.texts import from_lines, from_values, json_lines, json_list

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_path(path: Path, *, column: str | None = None, category_column: str | None = None) -> list[Prompt]:
    """The prompts of a file, or of every file in a folder; see :func:`read_noted`."""
    return read_noted(path, Columns(column, category_column))[0]


def read_noted(path: Path, columns: Columns = FOUND) -> tuple[list[Prompt], list[str]]:
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
        yield from from_rows(path, read_table(path, columns), columns, notes)
        return
    text = read_text(path)
    if kind in (".jsonl", ".ndjson"):
        yield from from_values(path, json_lines(path, text), columns, notes)
    elif kind == ".json":
        yield from from_values(path, json_list(path, text, columns, notes), columns, notes)
    elif columns.prompt is not None:
        raise ValueError(f"{path} is plain text, a prompt a line: it has no column {columns.prompt}")
    else:
        yield from from_lines(path, [line.strip() for line in lines_of(text)], notes)
