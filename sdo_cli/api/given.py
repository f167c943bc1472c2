"""What calls are given, as the commands have it: overrides, prompts, names of LoRAs and rewards."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdo_cli import provenance
from sdo_cli.api.objects import registered_reward
from sdo_cli.api.progress import Told
from sdo_cli.api.results import Run
from sdo_cli.errors import RecipeFault

Progress = bool | Callable[[Told], None]
Changes = Mapping[str, Any] | Sequence[str]


def overrides(changes: Changes, more: Mapping[str, Any]) -> list[str]:
    """``key=value`` of everything that is changed by name."""
    words = [_word(key, value) for key, value in changes.items()] if isinstance(changes, Mapping) else list(changes)
    return [*words, *(_word(key, value) for key, value in more.items())]


def _word(key: str, value: Any) -> str:
    """As on the command line; JSON is YAML's flow style.

    Raises:
        RecipeFault: an object, which no recipe can hold.
    """
    try:
        return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
    except TypeError as fault:
        text = f"{key}: a recipe holds names and numbers; objects go to finetune(rewards=[…], measure=[…], rule=…)"
        raise RecipeFault([text], what="call") from fault


def loras_of(loras: Any) -> list[str]:
    """Names as the command line has them."""
    if loras is None:
        return []
    several = [loras] if isinstance(loras, str | Path | Run) else list(loras)
    return [str(one) for one in several]


def judges_of(judges: Mapping[str, str] | Sequence[str]) -> list[str]:
    """As ``--judge`` has them."""
    if isinstance(judges, Mapping):
        return [f"{name}={target}" for name, target in judges.items()]
    return [judges] if isinstance(judges, str) else list(judges)


def names_of(rewards: Any) -> list[str]:
    """Of rewards given by name or as objects, one or several; objects are registered."""
    several = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    return [registered_reward(one) for one in several]


@contextmanager
def prompt_set(prompts: "str | Path | Iterable[str] | None") -> Iterator[str | None]:
    """Name or file of a prompt set; of prompts themselves a file as long as it is read."""
    if prompts is None or isinstance(prompts, str | Path):
        yield None if prompts is None else str(prompts)
        return
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    if not lines:
        raise RecipeFault(["prompts: give at least one"], what="call")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield str(path)


def stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


@contextmanager
def as_command(words: Sequence[str]) -> Iterator[None]:
    """What folders keep as the command that repeats them: this process' own line says nothing of it."""
    with provenance.instead(words):
        yield
