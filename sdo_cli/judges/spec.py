"""What a judge outside is, read off ``--judge``; imports nothing heavy."""

import contextlib
import hashlib
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
DEFAULT_NAME = "outside"
# VQAScore's, Lin et al. 2024, arXiv 2404.01291
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
COMMAND, JSON, OPENAI, TABLE = "command", "json", "openai", "table"
OPENAI_PREFIX = "openai+"


@dataclass(frozen=True)
class JudgeSpec:
    """One judge, as evaluation folders keep it.

    Attributes:
        kind: ``command``, ``json`` (a server), ``openai`` (a server that answers chat completions) or ``table``.
        target: the command line, the address, or the file; of ``openai`` with ``#model``.
        question: of ``openai``: what is asked, with ``{prompt}``.
        version: what the scores there are by; empty as long as there are none.
    """

    kind: str
    target: str
    question: str = ""
    version: str = ""


@dataclass(frozen=True)
class Asking:
    """How judges are asked; changes no score.

    Attributes:
        batch: pictures a call; None for 500 of a command, which may have to load a model first, and 8 of a server.
        timeout: seconds a call may take.
        retries: calls after one that failed, as long as none of them brings a score.
        workers: calls a server gets at a time.
    """

    batch: int | None = None
    timeout: float = 600.0
    retries: int = 2
    workers: int = 2

    def size(self, kind: str) -> int:
        if kind == OPENAI:
            return 1
        return self.batch or (500 if kind == COMMAND else 8)

    def problems(self) -> list[str]:
        wrong = []
        if self.batch is not None and self.batch < 1:
            wrong.append(f"--judge-batch: must be at least 1, not {self.batch}")
        if not self.timeout > 0:
            wrong.append(f"--judge-timeout: must be above 0 seconds, not {self.timeout:g}")
        if self.retries < 0:
            wrong.append(f"--judge-retries: must not be negative, not {self.retries}")
        if not 1 <= self.workers <= 64:
            wrong.append(f"--judge-workers: must be between 1 and 64, not {self.workers}")
        return wrong


@dataclass(frozen=True)
class Outside:
    """What is asked or read this time: judges by name, and tables of scores. A folder's own are never run unasked."""

    judges: Mapping[str, JudgeSpec] = field(default_factory=dict)
    tables: tuple[Path, ...] = ()
    asking: Asking = field(default_factory=Asking)


NOTHING = Outside()


def read_judge(text: str, question: str | None, wrong: list[str]) -> tuple[str, JudgeSpec] | None:
    """Name and judge of ``[NAME=]COMMAND`` or ``[NAME=]ADDRESS``; else None, and a sentence in ``wrong``."""
    name, target = match.groups() if (match := NAMED.fullmatch(text.strip())) else (DEFAULT_NAME, text.strip())
    kind = kind_of(target)
    problem = _command_problem(target) if kind == COMMAND else _address_problem(kind, target)
    if problem:
        wrong.append(f"--judge {name}: {problem}")
        return None
    asked = (question or QUESTION) if kind == OPENAI else ""
    if asked and "{prompt}" not in asked:
        wrong.append("--judge-question: has no {prompt}, so every picture would be asked the same")
        return None
    return name, JudgeSpec(kind, target, asked)


def kind_of(target: str) -> str:
    scheme = target.partition("://")[0].lower() if "://" in target.split(" ")[0] else ""
    return {"http": JSON, "https": JSON, "openai+http": OPENAI, "openai+https": OPENAI}.get(scheme, COMMAND)


def words_of(target: str) -> list[str]:
    """Raises ValueError for a quotation mark that is not closed."""
    return shlex.split(target)


def _command_problem(target: str) -> str:
    try:
        words = words_of(target)
    except ValueError as fault:
        return f"cannot be read as a command ({fault}); put quotation marks in pairs"
    for mark in ("{images}", "{out}"):
        if not any(mark in word for word in words):
            return f"has no {mark}; write a command with {{images}} and {{out}}, or an address http://…"
    if shutil.which(words[0]) is None:
        return f"there is no program {words[0]}; give its path"
    return ""


def _address_problem(kind: str, target: str) -> str:
    try:
        parts = urlsplit(target.removeprefix(OPENAI_PREFIX))
        host, _ = parts.hostname, parts.port
    except ValueError as fault:
        return f"{target} is no address ({fault})"
    if not host:
        return f"{target} names no host; write http://127.0.0.1:8000/score"
    if parts.username or parts.password:
        return "has a password in its address, which files would keep; put a key into SDO_JUDGE_KEY"
    if kind == OPENAI and not parts.fragment:
        return f"{target} names no model; write {target}#MODEL"
    return ""


def unsaid_version(spec: JudgeSpec) -> str:
    """Of a judge that does not say its version: a digest of the files its command names, or where it was asked."""
    if spec.kind != COMMAND:
        return f"not said, asked at {spec.target}"
    found, digest = False, hashlib.sha256()
    for word in words_of(spec.target)[1:]:
        # a word that is no path may be longer than any name of a file
        with contextlib.suppress(OSError):
            if (path := Path(word)).is_file() and path.stat().st_size < 2**24:
                digest.update(path.read_bytes())
                found = True
    return f"not said, files {digest.hexdigest()[:16]}" if found else f"not said, command {spec.target}"
