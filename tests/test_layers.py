"""Rooms import downwards only, rooms on one row leave each other alone, and the CLI starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"cli"},
    {"bench"},
    {"finetune", "optimize", "evaluate", "prune", "doctor", "exporting"},
    {"reports"},
    {"gradients", "scoring", "drawing", "weights", "estimate"},
    {"sampling", "models", "rewards"},
    {"recipe", "plugins", "skipping"},
    {"prompt_sets", "parallel"},
    {"hub", "embedded", "files", "seeding", "progress", "device", "provenance"},
    {"errors", "threads"},
]
LEVEL = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}
# the schema is checked against literal tables that import no torch
TABLES = {"recipe": {"sdo_cli.gradients.rules", "sdo_cli.sampling.solvers", "rewards"}}
# models promise what sampling calls
SIBLINGS = {("models", "sampling")}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "rewards":
        return "rewards"
    return parts[1] if parts[0] == "sdo_cli" and len(parts) > 1 else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "sdo_cli":
                yield from (f"sdo_cli.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = sorted([*(ROOT / "sdo_cli").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")])


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if room is None or room in ("__init__", "__main__"):
        return
    assert room in LEVEL, f"{room} has no row"
    for module in imports(path):
        other = room_of(module)
        if other is None or other == room or module in TABLES.get(room, ()):
            continue
        assert other in LEVEL, f"{module} has no row"
        assert LEVEL[other] < LEVEL[room] or (room, other) in SIBLINGS, f"{room} imports {module}"


def test_no_room_is_a_drawer():
    assert not [p for p in SOURCES if p.stem in {"utils", "helpers", "common", "misc"}]


def test_the_cli_starts_without_torch():
    code = "import sys, sdo_cli.cli.app; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
