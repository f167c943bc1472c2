"""Keys of a recipe as text for a terminal, and all of them as the page docs/recipe.md."""

import textwrap
from collections.abc import Iterable

from sdo_cli.recipe.choices import Option
from sdo_cli.recipe.explain import Entry, explained, inside

WIDTH, PAGE_WIDTH = 100, 120
HEAD = """# Every key of a recipe

Made by `sdo recipe explain --markdown`; a test holds this page equal to the schema. `sdo recipe explain KEY` prints the
same for one key: `sdo recipe explain gradient.rule`, `guard`, or a last part like `rank`.

A recipe is a YAML file. Left-out keys have their defaults; *needed* ones have none. Any key can be given on the command
line, after the recipe: `sdo finetune --recipe mine.yaml seed=1 lora.rank=16 rewards.0.weight=2`. A number counts the
entries of a list, from 0. `sdo finetune --recipe mine.yaml --dry-run` checks a recipe and shows all its values.

"""
PARTS = {
    "finetune": ("## Recipes of `sdo finetune`", "`sdo recipe list` shows those that ship."),
    "optimize": (
        "## Recipes of `sdo optimize`",
        "`sdo optimize --list` shows those that ship. Here are the keys that fine-tuning recipes do not have, or mean"
        " otherwise. As there:",
    ),
}


def table() -> str:
    """All keys: default and a line each, fine-tuning recipes first."""
    every = explained()
    fine = [entry for entry in every if "finetune" in entry.verbs and not entry.repeats]
    steer = [entry for entry in every if entry.verbs == ("optimize",) and not entry.repeats]
    shared = ", ".join(entry.key for entry in fine if "optimize" in entry.verbs)
    lines = [*rows(fine), "", "Only in recipes of sdo optimize, or with another meaning there:", *rows(steer), ""]
    lines += _wrapped(f"In recipes of sdo optimize too, with the same meaning: {shared}.", WIDTH)
    return "\n".join([*lines, "", "One of them in full: sdo recipe explain KEY"])


def rows(entries: Iterable[Entry]) -> list[str]:
    """A line per key."""
    entries = list(entries)
    left, middle = max(len(e.key) for e in entries), max(len(_default(e)) for e in entries)
    return [f"{e.key:<{left}}  {_default(e):<{middle}}  {e.line}" for e in entries]


def _default(entry: Entry) -> str:
    return "needed" if entry.default is None else entry.default


def text_of(entry: Entry) -> str:
    """One key in full, for a terminal."""
    where = " and ".join(f"sdo {verb}" for verb in entry.verbs)
    lines = [f"{entry.key}   (recipes of {where})", f"  {_facts(entry)}", ""]
    lines += [f"  {line}" for line in _wrapped(f"{entry.line} {entry.more}", WIDTH - 2)]
    if entry.choices:
        lines += ["", *(f"  {line}" for line in _choices(entry))]
    if entry.is_group:
        lines += ["", *(f"  {row}" for row in rows(inside(entry)))]
    lines += ["", "  for example", *(f"    {line}" for line in entry.example.splitlines())]
    return "\n".join(lines)


def _facts(entry: Entry, mark: str = "") -> str:
    default = {None: "needed", "": ""}.get(entry.default, f"default {mark}{entry.default}{mark}")
    return "; ".join(filter(None, (entry.type, default)))


def _choices(entry: Entry) -> list[str]:
    if not any(choice.text or choice.options for choice in entry.choices):
        return _wrapped(f"One of {', '.join(choice.name for choice in entry.choices)}.", WIDTH - 2)
    width = max(len(choice.name) for choice in entry.choices)
    lines: list[str] = []
    for choice in entry.choices:
        lines += _hanging(f"{choice.name:<{width}}  ", choice.text, WIDTH - 2)
        for option in choice.options:
            lines += _hanging("    ", f"{option.name}: {_of_option(option)}", WIDTH - 2)
    return lines


def _of_option(option: Option) -> str:
    default = "needed" if option.default is None else f"default {option.default}"
    return f"{option.meaning.rstrip('.')} ({option.type}; {default})"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text.strip(), width, break_long_words=False, break_on_hyphens=False)


def _hanging(first: str, text: str, width: int) -> list[str]:
    lines = _wrapped(text, width - len(first)) or [""]
    return [f"{first}{lines[0]}".rstrip(), *(" " * len(first) + line for line in lines[1:])]


def page() -> str:
    """docs/recipe.md."""
    every = [entry for entry in explained() if not entry.repeats]
    shared = ", ".join(f"`{entry.key}`" for entry in every if len(entry.verbs) > 1)
    lines = [HEAD.rstrip(), ""]
    for verb, (title, text) in PARTS.items():
        own = [entry for entry in every if entry.verbs[0] == verb]
        said = text if verb == "finetune" else f"{text} {shared}."
        lines += [title, "", *_wrapped(said, PAGE_WIDTH), ""]
        lines += [*(f"    {row}".rstrip() for row in rows(own)), ""]
        for entry in own:
            lines += [*_section(entry), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(entry: Entry) -> list[str]:
    lines = [f"### `{entry.key}`", "", *_wrapped(_facts(entry, "`"), PAGE_WIDTH), ""]
    lines += _wrapped(f"{entry.line} {entry.more}", PAGE_WIDTH)
    if entry.choices:
        lines += ["", *_choice_list(entry)]
    return [*lines, "", *(f"    {line}" for line in entry.example.splitlines())]


def _choice_list(entry: Entry) -> list[str]:
    if not any(choice.text or choice.options for choice in entry.choices):
        return _wrapped(f"One of {', '.join(f'`{choice.name}`' for choice in entry.choices)}.", PAGE_WIDTH)
    lines: list[str] = []
    for choice in entry.choices:
        lines += _hanging("- ", f"`{choice.name}`" + (f": {choice.text}" if choice.text else ""), PAGE_WIDTH)
        for option in choice.options:
            lines += _hanging("  - ", f"`{option.name}`: {_of_option(option)}", PAGE_WIDTH)
    return lines
