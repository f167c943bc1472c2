"""Prompt lists: from a file, a list or a template."""

import itertools
import re
from pathlib import Path

from sdo_cli.prompt_sets.entries import Columns, Prompt
from sdo_cli.prompt_sets.files import read_noted
from sdo_cli.prompt_sets.read import shipped_file, shipped_folder
from sdo_cli.recipe.schema import PromptSource

__all__ = ["find_prompt_file", "read_prompts", "shipped_folder"]


def find_prompt_file(name: str, beside: Path | None) -> Path | None:
    """``name`` beside the recipe, as given, or among the shipped sets (with or without suffix)."""
    places = [beside / name] if beside else []
    places.append(Path(name).expanduser())
    return next((place for place in places if place.is_file()), None) or shipped_file(name)


def read_prompts(source: PromptSource, beside: Path | None) -> list[str]:
    """All prompts of a source, in order.

    Raises:
        ValueError: with the reason, when the source gives no prompts.
    """
    ways = [name for name in ("file", "lines", "template") if getattr(source, name) is not None]
    if len(ways) != 1:
        raise ValueError(f"needs exactly one of file, lines, template; has {', '.join(ways) or 'none'}")
    if source.values is not None and source.template is None:
        raise ValueError("values belong to a template; there is none")
    if source.column is not None and source.file is None:
        raise ValueError("column belongs to a file; there is none")
    if source.lines is not None:
        prompts = source.lines
    elif source.file is not None:
        prompts = _from_file(source.file, beside, source.column)
    else:
        prompts = _from_template(source.template or "", source.values or {})
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("gives no prompt at all; put at least one in, one a line")
    return prompts


def prompt_notes(source: PromptSource, beside: Path | None) -> list[str]:
    """Sentences on what a source that reads well leaves out."""
    return [] if source.file is None else _noted(source.file, beside, source.column)[1]


def _from_file(name: str, beside: Path | None, column: str | None) -> list[str]:
    # a run folder keeps them one a line
    return [" ".join(prompt.text.split("\n")) for prompt in _noted(name, beside, column)[0]]


def _noted(name: str, beside: Path | None, column: str | None) -> tuple[list[Prompt], list[str]]:
    path = find_prompt_file(name, beside)
    if path is None:
        raise ValueError(f"no file {name}; it is looked for beside the recipe, here, and among `sdo prompts`")
    return read_noted(path, Columns(column, prompt_key="column"))


def _from_template(template: str, values: dict[str, list[str]]) -> list[str]:
    names = re.findall(r"\{(\w+)\}", template)
    missing = [name for name in names if not values.get(name)]
    if missing:
        raise ValueError(f"the template names {', '.join(missing)}, which values does not give")
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError("the template has no {name} to fill in; use lines for plain prompts")
    choices = (dict(zip(names, words, strict=True)) for words in itertools.product(*(values[n] for n in names)))
    return [_fill(template, choice) for choice in choices]


def _fill(template: str, choice: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: choice[found[1]], template)
