"""The small models that ship with the package. Names: ``embedded`` (by context) or ``embedded:<folder>``."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
FOLDERS = ("emoji", "clip", "judge", "aesthetic", "tiny")
# adapters of the embedded model, taken where a LoRA is asked for
LORAS = ("student",)


def is_embedded(name: str) -> bool:
    return name == "embedded" or name.startswith("embedded:")


def folder(name: str, default: str = "clip") -> Path:
    """Where an embedded model lies.

    Raises:
        KeyError: no embedded model of that name.
    """
    which = name.partition(":")[2] or default
    if which not in FOLDERS:
        raise KeyError(f"no embedded model {which!r}; there are {', '.join(FOLDERS)}")
    return WEIGHTS / which
