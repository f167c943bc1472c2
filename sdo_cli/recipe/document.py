"""YAML and command-line values to one plain tree, remembering where every value came from."""

from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Key = tuple[str, ...]


@dataclass
class Document:
    """Attributes:
    tree: nested dicts and lists of plain values.
    origins: where a key was written, ``file:line`` or ``argument 'a=b'``.
    problems: what could not be read.
    unreadable: True when the file is no YAML mapping, so that nothing more can be said of it.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: bool = False

    def origin(self, key: Key) -> str:
        """Of the key, or of its nearest parent that was written down."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return "recipe"


def read_document(text: str, name: str, overrides: list[str]) -> Document:
    """Values through OmegaConf (so that ``1e-4`` is a number), positions and duplicate keys from the YAML nodes."""
    document = Document(origins={(): name})
    try:
        root = yaml.compose(text)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        document.problems.append(
            f"{where}: not valid YAML: {getattr(fault, 'problem', None) or fault}; check indentation"
        )
        root, document.unreadable = None, True
    if isinstance(root, yaml.MappingNode):
        try:
            _note_positions(root, (), name, document)
            document.tree = _values(yaml.serialize(root), name, document)
        except RecursionError:
            document.unreadable = True
            document.problems.append(f"{name}: an anchor (&) contains itself; write its value out")
    elif not document.unreadable:
        document.unreadable = True
        document.problems.append(f"{name}:1: a recipe is a mapping of keys to values; start with `model: …`")
    for argument in overrides:
        _apply_override(argument, document)
    return document


def _values(text: str, name: str, document: Document) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as fault:
        document.problems.append(f"{name}: {str(fault).splitlines()[0]}; check the ${{…}}, tags and keys in the file")
        document.unreadable = True
        return {}
    return {str(k): v for k, v in tree.items()} if isinstance(tree, dict) else {}


def _note_positions(node: yaml.Node, key: Key, name: str, document: Document) -> None:
    """Fill ``origins``; a key written twice is reported and its first value kept."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        kept = []
        for key_node, value_node in node.value:
            line, word = key_node.start_mark.line + 1, str(key_node.value)
            inner = (*key, word)
            if word in seen:
                document.problems.append(
                    f"{name}:{line}: {'.'.join(inner)}: written twice, first in line {seen[word]}; remove one"
                )
                continue
            seen[word] = line
            kept.append((key_node, value_node))
            document.origins[inner] = f"{name}:{line}"
            _note_positions(value_node, inner, name, document)
        node.value = kept
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.origins[*key, str(index)] = f"{name}:{item.start_mark.line + 1}"
            _note_positions(item, (*key, str(index)), name, document)


def _apply_override(argument: str, document: Document) -> None:
    word, equals, raw = argument.partition("=")
    if not equals or not word:
        document.problems.append(f"argument {argument!r}: not of the form key=value; write for example seed=1")
        return
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"v: {raw}"))["v"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, yaml.YAMLError):
        value = raw
    key = tuple(word.split("."))
    place: Any = document.tree
    for depth, part in enumerate(key[:-1]):
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                here = ".".join(key[:depth])
                document.problems.append(f"argument {argument!r}: {here} is a list with {len(place)} entries, from 0")
                return
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            document.problems.append(f"argument {argument!r}: {'.'.join(key[: depth + 1])} holds a value, no keys")
            return
    last = key[-1]
    if isinstance(place, list):
        if not last.isdecimal() or int(last) >= len(place):
            document.problems.append(f"argument {argument!r}: {word}: the list has {len(place)} entries, from 0")
            return
        place[int(last)] = value
    else:
        place[last] = value
    document.origins = {k: v for k, v in document.origins.items() if k[: len(key)] != key}
    document.origins[key] = f"argument {argument!r}"
