"""A prompt and a set of them, and the text they are read from; torch-free."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# columns that hold prompts, in the order they are looked for, any case
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text", "description")
DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    text: what is drawn.
    category: empty where the source has none.
    extra: the other columns of the source.
    names: by which its pictures may be called: its own file in a folder of prompts, or a place for each column of ids
        and names, empty where the row has none.
    picture: the file of its picture, where a column says so.
    """

    text: str
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = field(default=(), compare=False)
    picture: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, and where they came from: a path, ``shipped:NAME`` or ``hub:owner/name@revision/file``.

    ``notes`` are sentences on what was left out.
    """

    name: str
    source: str
    prompts: list[Prompt]
    notes: list[str] = field(default_factory=list)

    @property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over texts and categories, in order."""
        content = json.dumps([[prompt.text, prompt.category] for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Columns:
    """Those asked for, and what the asker calls them; None finds one."""

    prompt: str | None = None
    category: str | None = None
    prompt_key: str = "--column"
    category_key: str = "--category-column"


# whichever are there
FOUND = Columns()


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte-order mark, also where files were joined; raises ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig").replace("\n\ufeff", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as fault:
        raise ValueError(f"{path} cannot be read: {fault.strerror}") from None


def lines_of(text: str) -> list[str]:
    """At line ends only: JSON may hold U+2028 and its like as they are, which ``splitlines`` takes for ends, too."""
    return text.split("\n")
