"""``draft-k`` and ``draft-lv`` (Clark et al. 2023, arXiv 2309.17400)."""

from dataclasses import replace

import torch

from sdo_cli.gradients.plan import Mode, Plan, plan_of
from sdo_cli.sampling.coefficients import Coefficients


def draft_k(calls: int, batch: int, coefficients: Coefficients, generator: torch.Generator, *, k: int = 1) -> Plan:
    """Backpropagation through the last calls.

    Args:
        k: how many calls; all of them is ``full``.
    """
    del coefficients, generator
    if not 1 <= k <= calls:
        raise ValueError(f"k must be in 1 … {calls}, not {k}")
    return plan_of(calls, batch, slice(calls - k, calls), Mode.THROUGH)


def draft_lv(
    calls: int, batch: int, coefficients: Coefficients, generator: torch.Generator, *, repeats: int = 2
) -> Plan:
    """The last call, then ``repeats`` times the last call again on the image with fresh noise of that level.

    All ``repeats`` + 1 rewards are averaged: lower variance of the last step's gradient for one call each.

    Args:
        repeats: how often, 1 to 64.
    """
    del coefficients
    plan = plan_of(calls, batch, [calls - 1], Mode.WEIGHTS)
    return replace(plan, repeats=torch.randint(2**32, (repeats, batch), generator=generator))
