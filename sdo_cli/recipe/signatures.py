"""What a function takes and says of it, read from its source: importing the rules and rewards would import torch."""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

NO_DEFAULT: Any = object()


@dataclass(frozen=True)
class Signature:
    """Attributes:
    defaults: of every parameter; ``NO_DEFAULT`` where there is none.
    meanings: of the parameters that the docstring's ``Args:`` name.
    """

    defaults: dict[str, Any]
    meanings: dict[str, str]


def signature_in(module: str, function: str) -> Signature:
    """Of a function of a module that is not imported; its defaults are literals or constants of the module."""
    tree = _parsed(module)
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments, constants = found.args, _constants(tree)
    named = [*arguments.args, *arguments.kwonlyargs]
    missing: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    values = [*missing, *arguments.defaults, *arguments.kw_defaults]
    defaults = {name.arg: _value(value, constants) for name, value in zip(named, values, strict=True)}
    return Signature(defaults, meanings_in(ast.get_docstring(found) or ""))


def signature_of(function: Callable[..., Any]) -> Signature:
    """Of a function or class that is there already: a plug-in's."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: NO_DEFAULT if p.default is inspect.Parameter.empty else p.default for p in parameters}
    return Signature(defaults, meanings_in(inspect.getdoc(function) or ""))


def word_in(module: str, constant: str, keyword: str) -> str:
    """The text given as ``keyword`` where ``constant`` of the module is made; empty where there is none."""
    for node in _parsed(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _name(node.targets[0]) == constant:
            for given in node.value.keywords:
                if given.arg == keyword and isinstance(given.value, ast.Constant):
                    return str(given.value.value)
    return ""


def meanings_in(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Args:``, each on one line."""
    found: dict[str, str] = {}
    _, _, section = docstring.partition("Args:\n")
    name = ""
    for line in dedent(section.partition("\n\n")[0]).splitlines():
        if entry := re.match(r"(\w+): (.*)", line):
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return {name: text.replace("``", "`") for name, text in found.items()}


@cache
def _parsed(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _constants(tree: ast.Module) -> dict[str, Any]:
    return {
        _name(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


def _value(node: ast.expr | None, constants: dict[str, Any]) -> Any:
    if node is None:
        return NO_DEFAULT
    return constants[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
