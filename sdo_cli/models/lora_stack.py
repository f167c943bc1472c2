"""Several LoRAs at once, each with its weight, as one word: ``a.safetensors:0.8+runs/b``."""

from dataclasses import dataclass
from pathlib import Path

from sdo_cli.embedded import lora_place


@dataclass(frozen=True)
class Stacked:
    """Attributes:
    path: run folder, file, or name on the hub.
    scale: its own weight, beside the weight of the whole.
    """

    path: str
    scale: float = 1.0


def stack_of(text: str) -> list[Stacked]:
    """The LoRAs a word names; what is there under the whole word is one."""
    if Path(lora_place(text)).expanduser().exists():
        return [Stacked(text)]
    return [_one(part) for part in text.split("+") if part] or [Stacked(text)]


def _one(text: str) -> Stacked:
    path, colon, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        return Stacked(text)
    return Stacked(path, scale) if colon and path else Stacked(text)


def is_plain(text: str) -> bool:
    """Whether a word names one LoRA at its own weight."""
    (first, *others) = stack_of(text)
    return not others and first.scale == 1.0
