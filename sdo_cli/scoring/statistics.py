"""Paired statistics. The unit is the prompt: seeds of one prompt are averaged first."""

from dataclasses import dataclass

from torch import Tensor


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
