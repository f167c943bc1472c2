"""How this sdo is called and was installed: lines printed to be typed run as they stand."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "sdo-diffusion"
ROOT = Path(__file__).parent.parent


def sdo(*words: object) -> str:
    """A command line of sdo for a shell in this folder; with the path of ``sdo`` where a shell would not find it."""
    return shlex.join([*_called(), *map(str, words)])


def _called() -> list[str]:
    typed, python = Path(sys.argv[0]), Path(sys.executable)
    # what is in the folder of a tool installer (pipx, uv) is a link to the environment's
    found = typed.absolute() if typed.name == "sdo" and len(typed.parts) > 1 else python.with_name("sdo")
    return [_program(found)] if found.is_file() else [_program(python), "-m", "sdo_cli"]


def _program(path: Path) -> str:
    """The name, if a shell finds this very file by it; else the path, short where it lies below this folder."""
    found = shutil.which(path.name)
    # of Python's interpreters only the folders differ; `uv run` changes the PATH of what it runs alone
    if found and Path(found).parent.resolve() == path.parent.resolve() and "UV_RUN_RECURSION_DEPTH" not in os.environ:
        return path.name
    here = Path.cwd()
    if path.parent == here:
        return f"./{path.name}"
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def install_extra(name: str) -> str:
    """The line that adds an optional part of sdo (``8bit``, ``fid``, …) to this environment.

    An editable installation is named by its folder, anything else by the name of the distribution.
    """
    root = _checkout()
    if root is None:
        return install(f"{DISTRIBUTION}[{name}]")
    return install(f"{'.' if root == Path.cwd() else root}[{name}]", editable=True)


def install(*requirements: str, editable: bool = False) -> str:
    """The line that installs ``requirements``, like ``peft>=0.17``, into this environment."""
    return shlex.join([*_installer(), *(["-e"] if editable else []), *requirements])


def _installer() -> list[str]:
    python = Path(sys.executable)
    if find_spec("pip") is None:
        return ["uv", "pip", "install", "--python", _program(python)]
    pip = python.with_name("pip")
    return [_program(pip), "install"] if pip.is_file() else [_program(python), "-m", "pip", "install"]


def _checkout() -> Path | None:
    """The folder of an editable installation, or of the sources of an sdo that is not installed at all."""
    try:
        noted = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ROOT if (ROOT / "pyproject.toml").is_file() else None
    told = json.loads(noted or "{}")
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(told["url"]).path))


def requirements() -> Iterable[str]:
    """What sdo needs, as its distribution or, where it is not installed, the sources say."""
    try:
        return metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        import tomllib

        found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        return found
