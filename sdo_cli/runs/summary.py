"""What a finished run has to say."""

from dataclasses import dataclass, field
from pathlib import Path

from sdo_cli.scoring.statistics import Gain


@dataclass(frozen=True)
class RunSummary:
    """Attributes:
    gains: on the held-out prompts, by reward name.
    seconds: of training, by stage.
    best_step: of the check the guard liked most; None without checks.
    stopped_at: step at which the guard ended training, if it did.
    guided: means of the untrained model with ``validation.base_guidance_scale``, by reward; empty without it.
    """

    folder: Path
    gains: dict[str, Gain]
    trained_on: list[str]
    seconds: dict[str, float]
    steps: int
    best_step: int | None = None
    stopped_at: int | None = None
    guided: dict[str, float] = field(default_factory=dict)
