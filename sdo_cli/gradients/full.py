"""``full``: backpropagation through every step (DRaFT; Clark et al. 2023, arXiv 2309.17400)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, plan_of
from sdo_cli.sampling.coefficients import Coefficients


def full(calls: int, batch: int, coefficients: Coefficients, generator: torch.Generator) -> Plan:
    """Every call THROUGH with weight 1. Costs a forward and backward of all calls."""
    del coefficients, generator
    return plan_of(calls, batch, slice(None), Mode.THROUGH)
