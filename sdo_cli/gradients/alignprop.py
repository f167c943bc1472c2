"""``alignprop``: randomised truncated backpropagation (Prabhudesai et al. 2023, arXiv 2310.03739)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, plan_of
from sdo_cli.sampling.coefficients import Coefficients

# of the number of steps: the authors draw int(N(42, 5)) of 50
MEAN, DEVIATION = 0.84, 0.10


def alignprop(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    truncation: str = "gaussian",
    step: int | None = None,
) -> Plan:
    """Backpropagation through the calls i ≥ b, the same b for the whole batch.

    Args:
        truncation: how the first call b with gradients is drawn: ``gaussian`` around 0.84 of all (as in the authors'
            code), ``uniform`` over all calls, or ``fixed``.
        step: the b of truncation ``fixed``.
    """
    del coefficients
    if truncation == "fixed":
        if step is None or not 0 <= step < calls:
            raise ValueError(f"truncation fixed needs step in 0 … {calls - 1}, not {step}")
        b = step
    elif truncation == "uniform":
        b = int(torch.randint(calls, (1,), generator=generator))
    else:
        drawn = torch.randn((), generator=generator, dtype=torch.float64).item()
        b = min(calls - 1, max(0, int(calls * (MEAN + DEVIATION * drawn))))
    return plan_of(calls, batch, slice(b, calls), Mode.THROUGH)
