"""Loads foreign code: the Python files a user gives with ``--plugin``, and installed packages with entry points.

A recipe alone never runs foreign code: a file has to be given, a package has to be installed.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Container, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from sdo_cli.errors import PluginFault


@dataclass(frozen=True)
class Plugin:
    """What was loaded, for the manifest of a run: a file and its hash, or a package and its version."""

    path: str
    sha256: str
    package: str = ""


# what modules of given files are called
PLUGIN_MODULE = "sdo_plugin_"
_loaded: dict[Path, Plugin] = {}
# names of rewards and rules, as they register
REGISTERED: list[str] = []
# entry points of installed packages that were loaded, by group and name
_installed: dict[tuple[str, str], Plugin] = {}
# what a package declares in its own pyproject.toml
REWARDS, GRADIENT_RULES = "sdo.rewards", "sdo.gradient_rules"


def load_plugins(paths: Iterable[Path | str]) -> list[Plugin]:
    """Run each file once; what it registers (``@gradient_rule``, ``@reward``) is known from then on.

    Raises:
        PluginFault: no such file, or it raises.
    """
    return [_load(Path(path).expanduser().resolve(), str(path)) for path in paths]


def loaded_plugins() -> list[Plugin]:
    """Every plug-in of this process."""
    return [*_loaded.values(), *_installed.values()]


def installed_names(group: str) -> list[str]:
    """Names that installed packages offer; none of their code is run."""
    return sorted({point.name for point in entry_points(group=group)})


def load_installed(group: str, name: str, registry: Container[str]) -> bool:
    """Import the module an installed package offers under this name, which puts the name in the ``registry``.

    Returns:
        Whether there is such an entry point.

    Raises:
        PluginFault: its import fails or does not register the name, or several packages offer it.
    """
    points = list(entry_points(group=group, name=name))
    if len(points) > 1:
        both = " and ".join(_package(point) for point in points)
        raise PluginFault(f"{name} is offered by {both}", remedy="uninstall all but one of them")
    for point in points:
        _import(point, name, registry)
        _installed[group, name] = Plugin(point.value, "", _package(point))
    return bool(points)


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _import(point: EntryPoint, name: str, registry: Container[str]) -> None:
    where = f"the package {_package(point)} ({point.value})"
    remedy = "update or uninstall it; --debug shows where"
    try:
        point.load()
    # foreign code may raise anything
    except Exception as fault:
        raise PluginFault(f"{where} cannot be loaded: {type(fault).__name__}: {fault}", remedy=remedy) from fault
    if name not in registry:
        raise PluginFault(f"{where} offers {name!r} but registers nothing of that name", remedy=remedy)


def _load(path: Path, given: str) -> Plugin:
    if path in _loaded:
        return _loaded[path]
    if not path.is_file() or path.suffix != ".py":
        raise PluginFault(f"--plugin {given}: no such Python file", remedy="give the path of a .py file")
    text = path.read_bytes()
    name = f"{PLUGIN_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before = len(REGISTERED)
    try:
        spec.loader.exec_module(module)
    # foreign code may raise anything
    except Exception as fault:
        del sys.modules[name]
        where = f"{type(fault).__name__}: {fault}"
        raise PluginFault(f"--plugin {given}: {where}", remedy="run it with --debug to see where") from fault
    if len(REGISTERED) == before:
        raise PluginFault(
            f"--plugin {given}: registers neither a reward nor a gradient rule",
            remedy="put @reward(…) before a class or @gradient_rule(…) before a function, as in docs/plugins.md",
        )
    _loaded[path] = Plugin(str(path), hashlib.sha256(text).hexdigest())
    return _loaded[path]
