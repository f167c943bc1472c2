"""Every key of a recipe with type, range, default, meaning, choices and an example; imports no torch."""

import dataclasses
import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.check import AT_LEAST_ONE, FRACTIONS, NOT_NEGATIVE, POSITIVE
from sdo_cli.recipe.choices import CHOICES, Choice, as_yaml
from sdo_cli.recipe.meanings import MEANINGS, Meaning
from sdo_cli.recipe.schema import Recipe
from sdo_cli.recipe.steering_check import LIMITS
from sdo_cli.recipe.steering_meanings import STEERING_MEANINGS
from sdo_cli.recipe.steering_schema import Steering
from sdo_cli.recipe.typed import SCALARS
from sdo_cli.sampling.solvers import MOST_STEPS

SCHEMAS: dict[str, Any] = {"finetune": Recipe, "optimize": Steering}
BOUNDS = {
    **dict.fromkeys(AT_LEAST_ONE, "at least 1"),
    **dict.fromkeys(NOT_NEGATIVE, "at least 0"),
    **dict.fromkeys(POSITIVE, "more than 0"),
    **dict.fromkeys(FRACTIONS, "at least 0, less than 1"),
    "num_inference_steps": f"1 to {MOST_STEPS}",
    "rollout.num_inference_steps": f"0 to {MOST_STEPS}",
    "eta": "0 to 1",
}
# beyond these a limit only catches typing errors
LARGE = 1e5


@dataclass(frozen=True)
class Entry:
    """Attributes:
    key: as it is written on the command line; a number counts the entries of a list from 0.
    verbs: whose recipes have it: finetune, optimize.
    type: in words, with its range.
    default: as a recipe would say it; None where it has to be given; empty of a group of keys.
    line, more: its meaning, the first sentence apart.
    repeats: the place where it is explained, of a group that comes again.
    """

    key: str
    verbs: tuple[str, ...]
    type: str
    default: str | None
    line: str
    more: str
    example: str
    choices: tuple[Choice, ...] = ()
    repeats: str = ""
    is_group: bool = False
    takes_names: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        return path_of(self.key)


def path_of(key: str) -> tuple[str, ...]:
    """The names in a key, without places in lists: ``rewards.0.weight``, ``rewards[0].weight``, ``rewards.weight``."""
    return tuple(part for part in key.replace("[", ".").replace("]", "").split(".") if part and not part.isdecimal())


def meaning_of(schema: Any, name: str) -> Meaning | None:
    """What a field of a schema means; a recipe of `sdo optimize` shares most of its fields."""
    for table in (STEERING_MEANINGS, MEANINGS):
        if name in table.get(schema, {}):
            return table[schema][name]
    return MEANINGS[Recipe].get(name) if schema is Steering else None


def entries(verb: str, schema: Any = None) -> list[Entry]:
    """All keys, groups before their own, in the order of the schema.

    Raises:
        LookupError: a key without a meaning.
    """
    return list(_walk(verb, schema or SCHEMAS[verb], ""))


def _first_places() -> dict[Any, str]:
    """Where a group that comes again is explained: below a key of fine-tuning recipes."""
    hints = get_type_hints(Recipe)
    return {inner: _place(key, hint) for key, hint in hints.items() if (inner := _inner(hint)) is not None}


def _place(key: str, hint: Any) -> str:
    return f"{key}.0." if get_origin(hint) is list else f"{key}."


def _walk(verb: str, schema: Any, before: str) -> Iterator[Entry]:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint, meaning = before + field.name, hints[field.name], meaning_of(schema, field.name)
        inner = _inner(hint)
        if meaning is None:
            raise LookupError(f"{schema.__name__}.{field.name} has no meaning; write one in recipe/meanings.py")
        yield Entry(
            key,
            (verb,),
            ", ".join(filter(None, (type_text(hint), bounds_of(verb, key)))),
            _default_text(field, inner is not None and get_origin(hint) is not list),
            meaning.line,
            meaning.more,
            meaning.example,
            CHOICES.get((verb, key), tuple)(),
            is_group=inner is not None,
            takes_names=get_origin(hint) is dict,
        )
        if inner is not None:
            place = _place(key, hint)
            first = _first_places().get(inner, place)
            found = _walk(verb, inner, place)
            yield from found if first == place else (replace(entry, repeats=first) for entry in found)


def _inner(hint: Any) -> Any:
    """The schema of a group of keys, or of a list's entries; None for a value."""
    for part in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(part):
            return part
    return None


def type_text(hint: Any) -> str:
    """A type as it is said to people."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return type_text(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if _inner(hint) is not None:
        return "a list, each entry with keys of its own" if origin is list else "a group of keys"
    if origin is list:
        return "a list"
    if origin is dict:
        return "names, each with a list" if get_origin(arguments[1]) is list else "names, each with a value"
    return SCALARS[hint][1]


def bounds_of(verb: str, key: str) -> str:
    """The range a value has to be in, in words; empty where there is none."""
    if verb == "finetune":
        return BOUNDS.get(key, "")
    if key not in LIMITS:
        return ""
    low, high = LIMITS[key]
    return f"at least {low:g}" if high > LARGE else f"{low:g} to {high:g}"


def _default_text(field: Any, is_group: bool) -> str | None:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    if is_group:
        return ""
    return as_yaml(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def explained() -> list[Entry]:
    """All keys of both kinds of recipe, each once: a key that means the same in both names both."""
    fine, steer = entries("finetune"), {entry.key: entry for entry in entries("optimize")}
    both = {e.key for e in fine if e.key in steer and replace(steer[e.key], verbs=e.verbs) == e}
    shared = [replace(e, verbs=("finetune", "optimize")) if e.key in both else e for e in fine]
    return [*shared, *(entry for key, entry in steer.items() if key not in both)]


def find(word: str) -> list[Entry]:
    """What a key, or the last part of one, stands for: an entry, or one of each kind of recipe.

    Raises:
        RecipeFault: no such key, or the last part of several.
    """
    every, path = explained(), path_of(word)
    there = {entry.key: entry for entry in every}
    found = [entry for verb in SCHEMAS for entry in _of(path, [e for e in every if verb in e.verbs], word)]
    if found:
        own = (there[e.repeats + e.path[-1]] if e.repeats else e for e in found)
        return list(dict.fromkeys(own))
    raise RecipeFault([f"no key {word!r} in a recipe; {_near(word, every)}"], what="command line")


def _of(path: tuple[str, ...], every: list[Entry], word: str) -> list[Entry]:
    if exact := [entry for entry in every if entry.path == path]:
        return exact
    # names below gradient.options are a rule's, not the schema's
    if below := [e for e in every if e.takes_names and len(path) > len(e.path) and e.path == path[: len(e.path)]]:
        return below
    last = [entry for entry in every if not entry.repeats and entry.path[-len(path) :] == path]
    last = last or [e for e in every if not e.repeats and path[-1:] and path[-1] in _option_names(e) and len(path) == 1]
    if len(last) > 1:
        keys = " or ".join(entry.key for entry in last)
        raise RecipeFault([f"{word!r} may be {keys}; write one of them"], what="command line")
    return last


def _option_names(entry: Entry) -> set[str]:
    return {option.name for choice in entry.choices for option in choice.options}


def _near(word: str, every: list[Entry]) -> str:
    keys: dict[str, str] = {}
    for entry in every:
        for name in () if entry.repeats else (entry.key, entry.path[-1], *_option_names(entry)):
            keys.setdefault(name, entry.key)
    close = difflib.get_close_matches(word, keys, n=3, cutoff=0.6)
    near = dict.fromkeys(keys[name] for name in [name for name in keys if word in name][:3] or close)
    return f"did you mean {' or '.join(near)}?" if near else "`sdo recipe explain` shows all keys"


def inside(group: Entry) -> list[Entry]:
    """The keys of a group; those of a list's entries, where they are explained first."""
    depth = len(group.path) + 1
    return [
        entry
        for entry in explained()
        if len(entry.path) == depth and entry.path[:-1] == group.path and set(entry.verbs) & set(group.verbs)
    ]
