"""Small wrong changes, and which test catches each: whether the suite still bites after it was made quicker.

Two files come first, made by the suite itself (the tests say which of them runs which line, forked commands included):

    coverage run -m pytest -q -n 2 --junitxml=tests.xml; coverage combine
    python scripts/mutants.py run --tests tests.xml --out mutants.json
    python scripts/mutants.py table before.json mutants.json

A change is tried in a copy of the tree. Only tests that run the changed line are run, the shortest first, until one
fails; where the line runs at import, all tests that run anything of its file.
"""

import argparse
import ast
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from mutant_list import MUTANTS, Mutant

SOURCES = ("sdo_cli", "rewards")
# imported once, before the forks; nothing of ours
SLOW_IMPORTS = (
    "accelerate",
    "diffusers.optimization",
    "diffusers.training_utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "open_clip",
    "peft",
    "pytest",
    "scipy.stats",
    "transformers.models.clip.modeling_clip",
)
COPIED = (*SOURCES, "tests", "recipes", "scripts", "docs", "pyproject.toml", "README.md", "Makefile")


@dataclass(frozen=True)
class Place:
    """Where a change belongs: the file, its changed lines, and whether they run only when it is imported."""

    file: str
    lines: tuple[int, ...]
    at_import: bool


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    caught_by: the first test that failed; empty where none did.
    tried, of: tests that were run, of those that run the line; fewer where the time was up.
    """

    name: str
    file: str
    caught_by: str
    tried: int
    of: int
    seconds: float


def place_of(mutant: Mutant, root: Path) -> Place:
    """The one file that holds the text to be changed.

    Raises:
        LookupError: none does, or several, or it stands there twice.
    """
    files = [path for source in SOURCES for path in sorted((root / source).rglob("*.py"))]
    found = [(path, count) for path in files if (count := path.read_text().count(mutant.old))]
    if len(found) != 1 or found[0][1] != 1:
        where = ", ".join(f"{path.relative_to(root)} ({count} times)" for path, count in found) or "nowhere"
        raise LookupError(f"{mutant.name}: its text must stand in one place, not {where}")
    text = found[0][0].read_text()
    first = text[: text.index(mutant.old)].count("\n") + 1
    last = first + mutant.old.rstrip("\n").count("\n")
    spans = [
        (node.body[0].lineno, node.end_lineno)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inside = any(start <= first and last <= (end or 0) for start, end in spans)
    return Place(str(found[0][0].relative_to(root)), tuple(_statements(text, first, last)), not inside)


def _statements(text: str, first: int, last: int) -> Iterator[int]:
    """The changed lines, and the first line of the smallest statement around them: that one is what is traced."""
    yield from range(first, last + 1)
    around = [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and node.lineno <= first and last <= (node.end_lineno or 0)
    ]
    yield max(around, default=first)


class Traced:
    """Which test ran which line, from coverage's data file, and how long each test takes."""

    def __init__(self, data: Path, tests: Path) -> None:
        self._data = sqlite3.connect(data, check_same_thread=False)
        self.seconds = {
            _node(case): float(case.get("time", 0)) for case in xml.parse(tests).iter("testcase") if case.get("name")
        }

    def tests(self, place: Place) -> list[str]:
        """Node ids, shortest first."""
        rows = self._data.execute(
            "select context, numbits from line_bits join file on file.id = file_id join context on context.id ="
            " context_id where path like ?",
            (f"%/{place.file}",),
        ).fetchall()
        names = set()
        for context, bits in rows:
            name = context.rpartition("|")[2].partition(" (")[0]
            here = place.at_import or any(_has(bits, line) for line in place.lines)
            if name in self.seconds and here:
                names.add(name)
        return sorted(names, key=lambda name: self.seconds[name])


def _has(bits: bytes, line: int) -> bool:
    """coverage keeps line numbers as a bit each."""
    return line // 8 < len(bits) and bool(bits[line // 8] & 1 << line % 8)


def _node(case: xml.Element) -> str:
    """pytest's node id; its report writes the file as a module."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


@dataclass
class Try:
    """A change in a copy of the tree, whose tests are running in process ``pid``."""

    mutant: Mutant
    copy: Path
    place: Place
    tests: list[str]
    of: int
    text: str
    begun: float
    pid: int = 0

    def verdict(self, status: int | None) -> Verdict:
        """Change the copy back; ``status`` as ``waitpid`` gives it, None where the time was up."""
        (self.copy / self.place.file).write_text(self.text)
        caught = "time" if status is None else "" if status == 0 else _first_failure(self.copy, status)
        seconds = round(time.monotonic() - self.begun, 1)
        return Verdict(self.mutant.name, self.place.file, caught, len(self.tests), self.of, seconds)


def start(mutant: Mutant, root: Path, copy: Path, traced: Traced, limit: float, catcher: str) -> Try:
    """Change the copy and run its tests until one fails, in a fork of this process, which has imported what is slow."""
    place = place_of(mutant, root)
    every = traced.tests(place)
    # what caught it last time most likely does again
    every = [catcher] * (catcher in every) + [name for name in every if name != catcher]
    chosen, budget = every[:1], limit
    for name in every[1:]:
        budget -= traced.seconds[name]
        if budget < 0:
            break
        chosen.append(name)
    path = copy / place.file
    found = Try(mutant, copy, place, chosen, len(every), path.read_text(), time.monotonic())
    path.write_text(found.text.replace(mutant.old, mutant.new))
    (copy / "mutant.xml").unlink(missing_ok=True)
    if (pid := os.fork()) == 0:
        _run_tests(copy, chosen)
    found.pid = pid
    return found


def _run_tests(copy: Path, tests: list[str]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        log = os.open("mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for target in (1, 2):
            os.dup2(log, target)
        import pytest

        words = ["-q", "-x", "-p", "no:cacheprovider", "--junitxml=mutant.xml"]
        code = int(pytest.main([*words, *tests])) if tests else 0
    finally:
        os._exit(code)


def _first_failure(copy: Path, status: int) -> str:
    """The test that failed; ``crash`` and how where pytest did not come to an end."""
    if (report := copy / "mutant.xml").is_file():
        for case in xml.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                return _node(case) if case.get("classname") else f"collecting {case.get('name')}"
    return f"crash: {os.waitstatus_to_exitcode(status)}"


def verdicts(arguments: argparse.Namespace, wanted: list[Mutant], folder: Path) -> Iterator[Verdict]:
    """Of all, as they come; so many at a time as there are workers."""
    root, traced = arguments.tree.resolve(), Traced(arguments.coverage, arguments.tests)
    before = {v["name"]: v["caught_by"] for v in json.loads(arguments.before.read_text())} if arguments.before else {}
    free = [_copy(root, folder / str(number)) for number in range(arguments.workers)]
    running: list[Try] = []
    while wanted or running:
        while wanted and free:
            mutant = wanted.pop(0)
            catcher = before.get(mutant.name, "")
            running.append(start(mutant, root, free.pop(), traced, arguments.limit, catcher))
        time.sleep(0.2)
        for one in list(running):
            pid, status = os.waitpid(one.pid, os.WNOHANG)
            late = pid == 0 and time.monotonic() - one.begun > 4 * arguments.limit
            if late:
                os.killpg(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
            if pid or late:
                running.remove(one)
                free.append(one.copy)
                yield one.verdict(None if late else status)


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    known = {v["name"]: v for v in json.loads(out.read_text())} if out.is_file() else {}
    for mutant in MUTANTS:
        # all of them, before an hour is spent
        place_of(mutant, arguments.tree.resolve())
    wanted = [m for m in MUTANTS if m.name not in known and (not arguments.only or m.name in arguments.only)]
    for name in SLOW_IMPORTS:
        import_module(name)
    with tempfile.TemporaryDirectory(prefix="sdo-mutants-") as folder:
        for verdict in verdicts(arguments, wanted, Path(folder)):
            known[verdict.name] = asdict(verdict)
            out.write_text(json.dumps(list(known.values()), indent=1) + "\n")
            said = verdict.caught_by or f"SURVIVES {verdict.tried} of {verdict.of} tests"
            print(f"{verdict.seconds:6.1f} s  {verdict.name:<46} {said}", flush=True)
    caught = sum(bool(v["caught_by"]) for v in known.values())
    print(f"{caught} of {len(known)} caught")


def _copy(root: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for name in COPIED:
        place = root / name
        if place.is_dir():
            shutil.copytree(place, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif place.is_file():
            shutil.copy(place, to / name)
    return to


def table(arguments: argparse.Namespace) -> None:
    """A line per change: who caught it, before and after."""
    sides = [{v["name"]: v["caught_by"] for v in json.loads(path.read_text())} for path in arguments.verdicts]
    for mutant in MUTANTS:
        print(f"| {mutant.name} | " + " | ".join(side.get(mutant.name, "not tried") or "–" for side in sides) + " |")
    for path, side in zip(arguments.verdicts, sides, strict=True):
        print(f"{path}: {sum(map(bool, side.values()))} of {len(side)} caught")
    if len(sides) > 1 and (lost := [name for name, by in sides[0].items() if by and not sides[-1].get(name)]):
        sys.exit(f"no longer caught: {', '.join(lost)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("run", help="try every change that the result file does not know yet")
    runs.add_argument("--tree", type=Path, default=Path(__file__).parent.parent, help="the tree to change a copy of")
    runs.add_argument("--coverage", type=Path, default=Path(".coverage"), help="coverage's combined data file")
    runs.add_argument("--tests", type=Path, required=True, help="pytest's report of the same run (--junitxml)")
    runs.add_argument("--before", type=Path, help="an earlier result: its catchers are tried first")
    runs.add_argument("--out", type=Path, required=True, help="result; what is in it already is not tried again")
    runs.add_argument("--only", nargs="*", help="names of changes")
    runs.add_argument("--workers", type=int, default=2)
    runs.add_argument("--limit", type=float, default=240, help="seconds of tests for one change")
    runs.set_defaults(call=run)
    tables = verbs.add_parser("table", help="results side by side; fails where a later one catches less")
    tables.add_argument("verdicts", type=Path, nargs="+")
    tables.set_defaults(call=table)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
