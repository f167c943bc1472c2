"""Rooms import downwards only and files in no circle; rooms on one row leave each other alone; who needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdo_cli

ROOT = Path(__file__).parent.parent
ROWS = [
    {"api"},
    {"cli"},
    {"bench"},
    {"training", "steering", "evaluation", "prune", "doctor", "exporting"},
    {"runs"},
    {"reports", "records"},
    {"scoring", "drawing", "weights", "estimate", "judges"},
    {"models", "optimizers"},
    {"recipe"},
    {"gradients"},
    {"sampling", "rewards"},
    {"plugins", "skipping"},
    {"prompt_sets", "parallel"},
    {"hub", "embedded", "files", "seeding", "progress", "device", "provenance", "pixels"},
    {"errors"},
    {"installed", "threads"},
]
LEVEL = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "rewards":
        return "rewards"
    return parts[1] if parts[0] == "sdo_cli" and len(parts) > 1 else None


def imports(path: Path):
    """Modules, also those that functions import, and those imported for their types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path}: names of modules are whole here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = sorted([*(ROOT / "sdo_cli").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One way round for every circle that a walk from each file closes."""
    found, done, way = [], set(), []

    def walk(module: str) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            way.append(module)
            for other in sorted(arrows[module]):
                walk(other)
            way.pop()
            done.add(module)

    for module in sorted(arrows):
        walk(module)
    return found


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 30


def test_no_files_import_each_other_in_a_circle():
    """No exceptions: an import inside a function, or for a type alone, is an arrow like any other."""
    names = {name_of(path): path for path in SOURCES}
    # the top package hands the Python interface to users; inside nobody takes it from there
    handed_out = {f"sdo_cli.{name}" for name in sdo_cli.__all__} - {"sdo_cli.__version__"}
    del names["sdo_cli"]
    assert not any(handed_out & set(imports(path)) for path in names.values())
    arrows = {name: {other for other in imports(path) if other in names} - {name} for name, path in names.items()}
    assert sum(map(len, arrows.values())) > 500
    assert circles(arrows) == []


def test_circles_are_found_wherever_one_enters_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = room_of(name_of(path))
    if room is None or room in ("__init__", "__main__"):
        return
    assert room in LEVEL, f"{room} has no row"
    for module in imports(path):
        other = room_of(module)
        if other is None or other == room:
            continue
        assert other in LEVEL, f"{module} has no row"
        assert LEVEL[other] < LEVEL[room], f"{room} imports {module}"


def test_no_room_is_a_drawer():
    assert not [p for p in SOURCES if p.stem in {"utils", "helpers", "common", "misc"}]


def test_cli_and_recipes_need_no_torch():
    """The recipe is checked against tables of rules, solvers and rewards, all of which can be read without it."""
    recipe = [name_of(path) for path in SOURCES if room_of(name_of(path)) == "recipe"]
    names = ", ".join(["sdo_cli.cli.app", "sdo_cli.runs.read", *recipe])
    code = f"import sys, {names}; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
