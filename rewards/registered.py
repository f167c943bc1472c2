"""What a plug-in tells of its reward; imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Foreign:
    """A reward of a plug-in: the class, and what it says about itself."""

    make: Callable[..., Any]
    summary: str
    source: str
    licence: str
    range: tuple[float, float]
    differentiable: bool
    sees: str = "picture"
