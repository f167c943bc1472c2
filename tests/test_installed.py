"""Lines that sdo prints to be typed: they run as they stand, from wherever and however it is installed."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rewards
import sdo_cli
from sdo_cli import installed
from sdo_cli.optimizers.adamw import PACKAGES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a virtual environment whose programs print what they were given; sdo runs from it."""

    def program(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\nfor word; do printf "<%s>" "$word"; done\n')
        path.chmod(0o755)

    folder = tmp_path / "my work"
    for name in ("python", "pip", "sdo"):
        program(folder / ".venv" / "bin" / name)
    program(tmp_path / "stranger" / "sdo")
    monkeypatch.setattr(sys, "executable", str(folder / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'stranger'}:/usr/bin:/bin")
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    monkeypatch.chdir(folder)
    return folder


def test_a_line_names_the_environment_where_sdo_is_not_on_the_path(place, monkeypatch):
    line = installed.sdo("sample", "a tiger's 'hat'", "--lora", Path("runs/a b"), "--steps", 20)
    assert line.startswith(".venv/bin/sdo sample ")
    typed = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert typed.stdout == "<sample><a tiger's 'hat'><--lora><runs/a b><--steps><20>", typed.stderr
    monkeypatch.chdir(place.parent)
    assert installed.sdo("doctor") == "'my work/.venv/bin/sdo' doctor"
    monkeypatch.chdir("/")
    assert subprocess.run(installed.sdo("x"), shell=True, capture_output=True, text=True).stdout == "<x>"
    monkeypatch.chdir(place / ".venv" / "bin")
    assert installed.sdo("doctor") == "./sdo doctor"


def test_the_name_is_enough_where_a_shell_finds_this_sdo_by_it(place, monkeypatch):
    monkeypatch.setenv("PATH", f"{place / '.venv' / 'bin'}:/usr/bin:/bin")
    assert installed.sdo("doctor") == "sdo doctor"
    # uv's own change of the PATH ends with the command
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert installed.sdo("doctor") == ".venv/bin/sdo doctor"


def test_a_link_in_a_folder_of_tools_is_what_was_typed(place, monkeypatch):
    tools = place.parent / "tools"
    tools.mkdir()
    (tools / "sdo").symlink_to(place / ".venv" / "bin" / "sdo")
    monkeypatch.setattr(sys, "argv", [str(tools / "sdo")])
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert installed.sdo("doctor") == "sdo doctor"


def test_without_the_command_python_runs_the_package(place):
    (place / ".venv" / "bin" / "sdo").unlink()
    assert installed.sdo("doctor") == ".venv/bin/python -m sdo_cli doctor"


def noted(monkeypatch, note):
    """As if this were what the installer wrote into ``direct_url.json``."""

    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return note if note is None else json.dumps(note)

    monkeypatch.setattr(installed.metadata, "distribution", lambda name: Distribution())


def test_an_extra_of_a_checkout_is_installed_from_its_folder(place, monkeypatch):
    noted(monkeypatch, {"url": place.as_uri(), "dir_info": {"editable": True}})
    assert installed.install_extra("8bit") == ".venv/bin/pip install -e '.[8bit]'"
    monkeypatch.chdir("/")
    typed = subprocess.run(installed.install_extra("8bit"), shell=True, capture_output=True, text=True)
    assert typed.stdout == f"<install><-e><{place}[8bit]>", typed.stderr


@pytest.mark.parametrize(
    "note", [None, {"url": "file:///x.whl", "archive_info": {}}, {"url": "file:///x", "dir_info": {}}]
)
def test_an_extra_of_a_wheel_is_installed_by_name(note, place, monkeypatch):
    noted(monkeypatch, note)
    assert installed.install_extra("8bit") == ".venv/bin/pip install 'sdo-diffusion[8bit]'"
    monkeypatch.setenv("PATH", f"{place / '.venv' / 'bin'}:/usr/bin:/bin")
    assert installed.install_extra("8bit") == "pip install 'sdo-diffusion[8bit]'"


def test_sources_that_nobody_installed_are_their_own_folder(place, monkeypatch):
    def nothing(name):
        raise installed.metadata.PackageNotFoundError(name)

    for name in ("distribution", "requires"):
        monkeypatch.setattr(installed.metadata, name, nothing)
    assert installed.install_extra("fid") == f".venv/bin/pip install -e '{ROOT}[fid]'"
    assert list(installed.requirements()) == PROJECT["dependencies"]


def test_an_environment_without_pip_is_uvs(place, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert installed.install("peft>=0.17", "x") == "uv pip install --python .venv/bin/python 'peft>=0.17' x"


def test_one_name_and_one_version():
    assert PROJECT["name"] == installed.DISTRIBUTION == rewards.BELONGS_TO
    assert PROJECT["version"] == sdo_cli.__version__
    old = "sdo" + "-cli"
    kept = ("CHANGELOG.md", "docs/log.md")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = [ROOT / name for name in tracked if Path(name).suffix in {".py", ".md", ".toml", ".def", ".sh", ".yaml"}]
    assert not [p for p in texts if p.is_file() and p.relative_to(ROOT).as_posix() not in kept and old in p.read_text()]


def test_every_extra_that_is_named_is_there():
    sources = [path.read_text() for path in (*(ROOT / "sdo_cli").rglob("*.py"), *(ROOT / "rewards").rglob("*.py"))]
    named = {name for text in sources for name in re.findall(r"install_extra\(['\"]([\w]+)['\"]\)", text)}
    named |= {extra for *_, extra in PACKAGES.values()}
    assert named >= {"fid", "deepspeed", "8bit", "parquet"} and named <= set(PROJECT["optional-dependencies"])


def make(target, folder):
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    command = ["make", "-n", target, f"VENV={folder / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    return done.stdout.splitlines()


def test_make_demo_installs_what_running_needs_and_says_so_first(tmp_path):
    lines = make("demo", tmp_path)
    assert lines[0].startswith('echo "== ') and not [line for line in lines if "[dev]" in line or "--quiet" in line]
    assert [line for line in lines if line.endswith("--editable .")] and "recipe quickstart" in lines[-1]


@pytest.mark.parametrize("target", ["test", "check", "setup"])
def test_the_developers_tools_come_with_what_needs_them(target, tmp_path):
    lines = make(target, tmp_path)
    assert lines[0].startswith('echo "== ') and [line for line in lines if line.endswith('--editable ".[dev]"')]
