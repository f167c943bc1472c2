"""``refl``: reward feedback learning (Xu et al. 2023, ImageReward, arXiv 2304.05977)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, plan_of
from sdo_cli.sampling.coefficients import Coefficients


def refl(calls: int, batch: int, coefficients: Coefficients, generator: torch.Generator) -> Plan:
    """One random call m in the last quarter (30 … 39 of 40); sampling stops there, the reward sees its x0-prediction.

    The same m for the whole batch, as in the authors' code: so nobody samples further than needed.
    """
    del coefficients
    first = min(calls - 1, calls * 3 // 4)
    m = int(torch.randint(first, calls, (1,), generator=generator))
    return plan_of(calls, batch, [m], Mode.WEIGHTS, endpoint=m)
