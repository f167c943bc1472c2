"""A check for over-optimisation: a line of ``guard.jsonl``, and what such lines say together."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdo_cli.scoring.statistics import Values

OBJECTIVE = "objective"
# a spread that is only rounding
FLAT = 1e-9
# standard errors by which the trained reward itself may fall
COLLAPSE = 2.0


@dataclass(frozen=True)
class Check:
    """A line of ``guard.jsonl``.

    Attributes:
        values: by measure, one per prompt, its seeds averaged; ``objective`` is what training raises, -loss.
        untrained: the measures that quality stands on.
    """

    step: int
    values: dict[str, list[float]]
    untrained: list[str]

    def of(self, measure: str) -> Values:
        return np.array(self.values[measure], dtype=np.float64)


@dataclass(frozen=True)
class Verdict:
    """What the checks so far say.

    Attributes:
        best: step of the check whose quality is highest.
        reference: the same, the untrained model among them: what a fall is held against.
        bad: checks in a row whose quality is below the reference's by more than its standard error, or whose objective
            is below the untrained model's by more than two: then nothing is left to win.
        fall: of the last check's quality from the reference's, in standard deviations, and its standard error.
        rise: of the objective since the reference.
    """

    best: int
    reference: int
    bad: int
    fall: tuple[float, float]
    rise: float

    def sentence(self, objective: str) -> str:
        return (
            f"for {self.bad} checks the pictures got worse; since step {self.reference} the rewards not trained on "
            f"changed by {self.fall[0]:+.2f} ± {self.fall[1]:.2f} standard deviations over prompts, {objective} by "
            f"{self.rise:+.4f}"
        )


def gain(check: Check, first: Check, measures: list[str]) -> Values:
    """Per prompt, the mean over ``measures`` of the gain since ``first``, each in units of its spread there."""
    gains = []
    for name in measures:
        before = first.of(name)
        spread = before.std(ddof=1) if len(before) > 1 else 0.0
        # all alike: nothing to measure it in
        gains.append((check.of(name) - before) / (spread if spread > FLAT else 1.0))
    return np.mean(np.array(gains), axis=0)


def quality(check: Check, first: Check) -> Values:
    """The gain in the rewards that are not trained on."""
    return gain(check, first, first.untrained)


def verdict(checks: list[Check]) -> Verdict:
    """Of two or more checks; the first is of the untrained model."""
    first = checks[0]
    worth = [quality(check, first) for check in checks]
    reference, bad, fall = 0, 0, (0.0, 0.0)
    sound: list[int] = []
    for k in range(1, len(checks)):
        lost = worth[k] - worth[reference]
        error = float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else 0.0
        fall = (float(lost.mean()), error)
        lower = first.of(OBJECTIVE) - checks[k].of(OBJECTIVE)
        finite = bool(np.isfinite(lost).all() and np.isfinite(lower).all())
        collapsed = not finite or bool(lower.mean() > COLLAPSE * lower.std(ddof=1) / len(lower) ** 0.5)
        bad = bad + 1 if collapsed or lost.mean() + error < 0 else 0
        if not collapsed:
            sound.append(k)
            reference = k if lost.mean() > 0 else reference
    # of a collapsed model the untrained rewards may say anything
    best = max(sound or range(1, len(checks)), key=lambda k: (np.nan_to_num(worth[k].mean(), nan=-np.inf), -k))
    rise = float((checks[-1].of(OBJECTIVE) - checks[reference].of(OBJECTIVE)).mean())
    return Verdict(checks[best].step, checks[reference].step, bad, fall, rise)


def checks_of(rows: list[dict[str, Any]]) -> list[Check]:
    """From the lines of ``guard.jsonl``."""
    return [Check(**row) for row in rows]


def said_of(check: Check) -> str:
    """Its means on one line."""
    return "  ".join(f"{name} {check.of(name).mean():.4f}" for name in check.values if name != OBJECTIVE)
