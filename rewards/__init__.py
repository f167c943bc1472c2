"""Reward models. ``build("clip")`` makes one; the table below names them all."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

# Read by sdo at start-up to tell this package from another one called `rewards`.
BELONGS_TO = "sdo-cli"

TABLE = {
    "clip-score": "rewards.clip_score",
    "aesthetic-v2": "rewards.aesthetic",
    "colorfulness": "rewards.colorfulness",
    "judge": "rewards.judge",
}
SHORT = {"clip": "clip-score", "aesthetic": "aesthetic-v2"}
# Known without importing torch, so that a recipe can be checked in milliseconds.
MEASURE_ONLY = frozenset({"judge"})
OPTIONS: Mapping[str, frozenset[str]] = {
    "clip-score": frozenset({"model", "pretrained"}),
    "aesthetic-v2": frozenset({"model", "head", "pretrained"}),
    "colorfulness": frozenset(),
    "judge": frozenset(),
}


def full_name(name: str) -> str:
    """``clip`` to ``clip-score``: short names stand for the newest version."""
    return SHORT.get(name, name)


def known_names() -> list[str]:
    return sorted(TABLE) + sorted(SHORT)


def build(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make the reward called ``name``; raises KeyError for an unknown one."""
    return import_module(TABLE[full_name(name)]).build(**(options or {}))
