"""What a judge is asked and what it answers: one contract for commands and servers, checked in one place."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Picture:
    """``id`` is the variant and the file's name; it comes back beside the score."""

    id: str
    file: Path
    prompt: str


@dataclass
class Answer:
    """Scores by a picture's id, higher is better, all finite.

    Attributes:
        version: empty where the judge does not say it.
        partial: it did not come to its end, and may have wanted to say its version there.
    """

    scores: dict[str, float] = field(default_factory=dict)
    version: str = ""
    partial: bool = False


class CallFault(Exception):
    """A call that did not bring every score.

    Args:
        cause: goes on from "judge NAME ".
        remedy: what the user can do.
        again: whether another try may help.
        found: what it brought nevertheless.
    """

    def __init__(self, cause: str, remedy: str, *, again: bool = True, found: Answer | None = None) -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.again, self.found = cause, remedy, again, found or Answer()


CONTRACT = "docs/evaluation.md says what a judge answers"


def read_rows(rows: Iterable[Any], pictures: list[Picture]) -> Answer:
    """Rows ``{"id": …, "score": …}``, and ``{"version": …}`` once or never, for some or all of ``pictures``.

    Raises:
        CallFault: something else; ``found`` has what may be kept. Where ids are mixed up, nothing may.
    """
    answer, ids, bad = Answer(), {picture.id for picture in pictures}, list[str]()
    for row in rows:
        if not isinstance(row, dict):
            raise CallFault(f"answered {_short(row)} where a row with id and score belongs", CONTRACT)
        if "version" in row:
            answer.version = str(row["version"])
        if "id" not in row and "version" in row:
            continue
        name = row.get("id")
        if not isinstance(name, str) or name not in ids:
            raise CallFault(f"gave a score for {_short(name)}, which it was not asked for", CONTRACT)
        if name in answer.scores or name in bad:
            raise CallFault(f"gave two scores for {name}", CONTRACT)
        if (score := _finite(row.get("score"))) is None:
            bad.append(name)
        else:
            answer.scores[name] = score
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CallFault(f"gave no finite number for {bad[0]}{more}", "look at the picture", found=answer)
    return answer


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    # a whole number that no float holds
    except OverflowError:
        return None


def read_lines(content: bytes, pictures: list[Picture], *, whole: bool) -> Answer:
    """Rows as JSON lines.

    Args:
        whole: the judge came to its end; else a last line that was cut off is left out.

    Raises:
        CallFault: as :func:`read_rows`, or a line that is no JSON.
    """
    rows = []
    lines = [line for line in content.split(b"\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(lines) and not content.endswith(b"\n"):
                if not whole:
                    break
                found = read_rows(rows, pictures)
                raise CallFault("left its answer half written", "let it write all of it", found=found) from None
            raise CallFault(f"wrote a line {number} that is no JSON: {_short(line)}", CONTRACT) from None
    answer = read_rows(rows, pictures)
    answer.partial = not whole
    return answer


def complete(answer: Answer, pictures: list[Picture]) -> Answer:
    """Raises CallFault where pictures have no score."""
    if len(answer.scores) < len(pictures):
        first = next(picture.id for picture in pictures if picture.id not in answer.scores)
        text = f"gave {len(answer.scores)} scores for {counted(len(pictures))}; the first without one is {first}"
        raise CallFault(text, CONTRACT, found=answer)
    return answer


def counted(number: int) -> str:
    return f"{number} picture{'s' * (number != 1)}"


def _short(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
