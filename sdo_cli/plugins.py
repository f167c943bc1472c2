"""Loads the Python files a user gives with ``--plugin``. A recipe alone never runs foreign code."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdo_cli.errors import PluginFault


@dataclass(frozen=True)
class Plugin:
    """What was loaded; the hash goes into the manifest of a run."""

    path: str
    sha256: str


_loaded: dict[Path, Plugin] = {}


def load_plugins(paths: Iterable[Path | str]) -> list[Plugin]:
    """Run each file once; what it registers (``@gradient_rule``) is known from then on.

    Raises:
        PluginFault: no such file, or it raises.
    """
    return [_load(Path(path).expanduser().resolve(), str(path)) for path in paths]


def loaded_plugins() -> list[Plugin]:
    """Every plug-in of this process."""
    return list(_loaded.values())


def _load(path: Path, given: str) -> Plugin:
    if path in _loaded:
        return _loaded[path]
    if not path.is_file() or path.suffix != ".py":
        raise PluginFault(f"--plugin {given}: no such Python file", remedy="give the path of a .py file")
    text = path.read_bytes()
    name = f"sdo_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    # foreign code may raise anything
    except Exception as fault:
        del sys.modules[name]
        where = f"{type(fault).__name__}: {fault}"
        raise PluginFault(f"--plugin {given}: {where}", remedy="run it with --debug to see where") from fault
    _loaded[path] = Plugin(str(path), hashlib.sha256(text).hexdigest())
    return _loaded[path]
