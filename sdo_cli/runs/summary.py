"""What a finished run has to say."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdo_cli.scoring.statistics import FELL, Gain, too_few


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

    @property
    def falls(self) -> list[str]:
        """What to look at before the LoRA is used: rewards that are lower than before."""
        return falls(self.gains, self.trained_on)

    @property
    def too_few(self) -> list[str]:
        """Why nothing is concluded, of a run that was measured on few prompts; else nothing."""
        counts = [gain.difference.n for gain in self.gains.values()][:1]
        return [few for count in counts if (few := too_few(count, "held-out prompts"))]


def falls(gains: Mapping[str, Gain], trained_on: Collection[str]) -> list[str]:
    """A sentence for every reward that training lowered by more than three standard errors, trained or not."""
    return [
        f"{name} ({'trained' if name in trained_on else 'only measured'}) fell by more than {FELL:g} standard errors: "
        f"{gain.difference.mean:+.4f} ± {gain.difference.standard_error:.4f} on {gain.difference.n} held-out prompts."
        for name, gain in gains.items()
        if gain.fell
    ]
