"""Paired statistics. The unit is the prompt: seeds of one prompt are averaged first."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Values = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 4000
# Below this many prompts the resamples are too alike; Student's t needs no resampling.
FEW = 10
# Below this many prompts nothing is concluded: no verdict, no recommended scale.
FEWEST = 10
# standard errors by which a reward has to be lower before it is said to have fallen
FELL = 3.0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error."""

    mean: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class Gain:
    """Before, after, and the paired difference; ``in_standard_errors`` is the difference over its own error."""

    before: Estimate
    after: Estimate
    difference: Estimate

    @property
    def in_standard_errors(self) -> float:
        error = self.difference.standard_error
        return self.difference.mean / error if error > 0 else float("nan")

    @property
    def times_its_error(self) -> str:
        """``+8.1``, or a dash where there is no error to count in: one prompt, or no difference at all."""
        return f"{self.in_standard_errors:+.1f}" if self.difference.standard_error > 0 else "–"

    @property
    def fell(self) -> bool:
        """By more than three standard errors; one prompt has none to tell by."""
        return self.difference.mean < -FELL * self.difference.standard_error


def estimate(scores: Tensor) -> Estimate:
    """Mean and standard error over prompts of ``scores [prompts]`` or ``[prompts, seeds]``."""
    values = scores.double()
    values = values.mean(1) if values.dim() == 2 else values
    n = len(values)
    error = (values.std(unbiased=True) / n**0.5).item() if n > 1 else float("nan")
    return Estimate(values.mean().item(), error, n)


def paired_gain(before: Tensor, after: Tensor) -> Gain:
    """Same prompts and seeds before and after, ``[prompts]`` or ``[prompts, seeds]``.

    Raises:
        ValueError: the shapes differ, so the scores cannot be pairs.
    """
    if before.shape != after.shape:
        raise ValueError(f"not paired: {tuple(before.shape)} against {tuple(after.shape)}")
    return Gain(estimate(before), estimate(after), estimate(after.double() - before.double()))


def too_few(count: int, noun: str = "prompts") -> str | None:
    """Why nothing is concluded from so few prompts; None where there are enough."""
    if count >= FEWEST:
        return None
    shown = noun.removesuffix("s") if count == 1 else noun
    return (
        f"No verdict and no recommendation: {count} {shown}, and under {FEWEST} chance decides; "
        "the figures are shown as they came out."
    )


@dataclass(frozen=True)
class Interval:
    """A mean or share with its 95 % interval; NaN where there are too few prompts to tell."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_interval(values: Values) -> Interval:
    """The mean of ``values [prompts]``: bootstrap over prompts, studentized and symmetric (Hall 1988).

    Of the bootstrap's kinds it keeps nearest to its 95 % for skewed and heavy-tailed differences (docs/log.md). The
    resamples are the same for the same number of prompts, so a repeated analysis repeats its figures.
    """
    from scipy import stats

    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    error = float(values.std(ddof=1) / n**0.5)
    # all alike, but for rounding
    if error <= 1e-12 * abs(mean):
        return Interval(mean, mean, mean, n)
    if n < FEW:
        reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
        return Interval(mean, mean - reach, mean + reach, n)
    which = np.random.default_rng(n).integers(0, n, (RESAMPLES, n))
    reach = studentized(values, which)
    return Interval(mean, mean - reach, mean + reach, n)


def studentized(values: Values, which: npt.NDArray[np.int64]) -> float:
    """Half the interval's width from resamples ``[resamples, n]`` of indices: se times the quantile of |m* - m|/se*.

    Resamples without spread have no quotient and are left out.
    """
    n = len(values)
    resampled = values[which]
    spread = resampled.std(axis=1, ddof=1)
    some = spread > 0
    quotient = np.abs(resampled.mean(axis=1)[some] - values.mean()) / (spread[some] / n**0.5)
    return float(np.quantile(quotient, LEVEL) * values.std(ddof=1) / n**0.5)


def win_rate(differences: Values) -> Interval:
    """Share of prompts with a positive difference ``[prompts]``, ties half each; Wilson's interval (1927)."""
    n = len(differences)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    share = float(((differences > 0) + 0.5 * (differences == 0)).mean())
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach), n)
