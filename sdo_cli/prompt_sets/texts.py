"""Prompts in plain text, one a line, or in JSON of the shapes people have; torch-free."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdo_cli.prompt_sets.entries import DELIMITERS, PROMPT_COLUMNS, Columns, Prompt, lines_of
from sdo_cli.prompt_sets.tables import from_rows

# what an object of JSON says of itself, beside its prompts
ABOUT = (
    "author", "comment", "created", "date", "description", "id", "info", "lang", "language", "licence", "license",
    "name", "note", "notes", "source", "title", "type", "url", "version", "$schema",
)  # fmt: skip
# a line of A1111's "Prompts from file"
SCRIPT = re.compile(r"(?:^|\s)--(?:prompt|negative_prompt)\s|^--[a-z_]+\s")


def from_lines(path: Path, lines: list[str], notes: list[str]) -> Iterator[Prompt]:
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


def json_lines(path: Path, text: str) -> Iterator[Any]:
    """A value a line; raises ValueError for one that is none."""
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as fault:
            raise ValueError(f"{path}:{number} is not JSON: {fault.msg}") from None


def json_list(path: Path, text: str, columns: Columns, notes: list[str]) -> list[Any]:
    """Texts or rows of a list, or of an object that holds some; raises ValueError where it is not clear which."""
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


def from_values(path: Path, values: Any, columns: Columns, notes: list[str]) -> Iterator[Prompt]:
    """Of texts alone, or of rows alone; raises ValueError for anything between."""
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
    yield from from_rows(path, values, columns, notes)
