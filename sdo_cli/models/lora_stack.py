"""Several LoRAs at once, each with its weight, as one word: ``a.safetensors:0.8+runs/b``."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.catalog import hub_lora
from sdo_cli.models.lora_paths import lora_place

# float() takes 1_0, nan and the digits of every script, too
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# between two LoRAs: no sign of a weight
_BETWEEN = re.compile(r"(?<!:)\+")
MOST = 1000.0


@dataclass(frozen=True)
class Stacked:
    """Attributes:
    path: run folder, file, or name on the hub.
    scale: its own weight, beside the weight of the whole.
    """

    path: str
    scale: float = 1.0

    def __str__(self) -> str:
        return self.path if self.scale == 1 else f"{self.path}:{exact(self.scale)}"


def stack_of(text: str) -> list[Stacked]:
    """The LoRAs a word names.

    ``+`` and ``:`` may be part of a name: the reading counts whose LoRAs are all there, or may be on the hub.

    Raises:
        EnvironmentFault: there are several such readings; a weight that is no plain number.
    """
    found = [list(reading) for reading in dict.fromkeys(_readings(text)) if reading]
    fewest = min((_on_hub(reading) for reading in found), default=0)
    found = [reading for reading in found if _on_hub(reading) == fewest]
    if len(found) > 1:
        one, other = (_said(reading, text) for reading in found[:2])
        # a path that begins with ./ is never the end of a longer name
        most = max(found, key=len)
        apart = "+".join(str(s) if s.path[:1] in "/~." else f"./{s}" for s in most)
        raise EnvironmentFault(
            f"the LoRA {text} may be {one}, or {other}: all of it is there",
            remedy="rename the one with this sign in its name"
            + (f"; or write {apart}, if that is meant" if len(most) > 1 else ""),
        )
    return found[0] if found else [_one(part) for part in _BETWEEN.split(text) if part] or [Stacked(text)]


def joined(words: Sequence[str]) -> str:
    """One word for the LoRAs of several words, which says the same of each.

    Raises:
        EnvironmentFault: as :func:`stack_of`, of a word.
    """
    stack = [one for word in words for one in stack_of(word)]
    for places in ("as given", "absolute"):
        whole = [one if places == "as given" else Stacked(_absolute(one.path), one.scale) for one in stack]
        text = "+".join(map(str, whole))
        try:
            if stack_of(text) == whole:
                return text
        except EnvironmentFault:
            continue
    names = " and ".join(one.path for one in stack)
    raise EnvironmentFault(
        f"the LoRAs {names} cannot be told apart in one word", remedy="rename those with + or : in them"
    )


def exact(scale: float) -> str:
    """A number short, but not another one."""
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


def is_plain(text: str) -> bool:
    """Whether a word names one LoRA at its own weight."""
    (first, *others) = stack_of(text)
    return not others and first.scale == 1.0


def number_of(text: str) -> float | None:
    """A decimal number in plain ASCII; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def _weight_of(text: str) -> float | None:
    number = number_of(text)
    return None if number is None or abs(number) > MOST else number


def _readings(text: str) -> Iterator[tuple[Stacked, ...]]:
    """Every way to cut a word into LoRAs that are there, or may be on the hub."""
    if not text:
        yield ()
        return
    ends = [place.start() for place in re.finditer(r"\+", text)] + [len(text)]
    for end in ends:
        first, rest = text[:end], text[end + 1 :]
        if ones := [()] if not first else [(one,) for one in _as_one(first)]:
            yield from (one + others for one in ones for others in _readings(rest))


def _as_one(text: str) -> Iterator[Stacked]:
    if _is_there(text) or hub_lora(text) is not None:
        yield Stacked(text)
    path, _, number = text.rpartition(":")
    if path and (scale := _weight_of(number)) is not None and (_is_there(path) or hub_lora(path) is not None):
        yield Stacked(path, scale)


def _is_there(path: str) -> bool:
    return Path(lora_place(path)).expanduser().exists()


def _on_hub(reading: Sequence[Stacked]) -> int:
    return sum(not _is_there(one.path) for one in reading)


def _one(text: str) -> Stacked:
    """A LoRA that is not there, or whose weight is no number."""
    path, colon, number = text.rpartition(":")
    if not colon or not path or _is_there(text):
        return Stacked(text)
    if (scale := _weight_of(number)) is not None:
        return Stacked(path, scale)
    if _is_there(path) or hub_lora(path) is not None or _is_float(number):
        raise EnvironmentFault(
            f"the weight {number!r} of the LoRA {path} is no plain number of at most {MOST:g}",
            remedy=f"write digits and a point, as {path}:0.8",
        )
    return Stacked(text)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


def _said(reading: Sequence[Stacked], text: str) -> str:
    if len(reading) == 1:
        (one,) = reading
        return f"{one.path} alone" if one.path == text else f"{one.path} at weight {exact(one.scale)}"
    return " and ".join(map(str, reading))
