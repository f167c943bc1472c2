"""``flowbp-sparse``: K late-biased steps of a cached rollout (FlowBP-Sparse, arXiv 2606.11075)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.sampling.coefficients import Coefficients


def flowbp_sparse(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    k: int = 4,
    late_bias: float = 1.0,
    rescale: float = 0.5,
    updates: int = 1,
) -> Plan:
    """Distinct calls for the whole batch, inputs detached.

    Args:
        k: how many calls.
        late_bias: call i has the odds (i + 1)^late_bias; 0 makes all equally likely.
        rescale: ρ of the factor ``1 + ρ (Σ_all |w_i| / Σ_live |w_i| - 1)`` on every live call: 0 leaves the sum
            over the live calls alone, 1 gives it the size of the sum over all.
    """
    odds = (torch.arange(calls, dtype=torch.float64) + 1) ** late_bias
    every = torch.multinomial(odds, min(k * updates, calls), replacement=False, generator=generator)
    if updates > 1:
        # what is drawn first is likelier late: that must not decide which update it is for
        every = every[torch.randperm(len(every), generator=generator)]
    size = torch.tensor(coefficients.w, dtype=torch.float64).abs()
    mode, weight = empty(calls, batch)
    turn = torch.zeros_like(mode)
    for update, chosen in enumerate(every.chunk(updates)):
        live = size[chosen].sum().item()
        # a last call may have no weight at all
        factor = 1 + rescale * (size.sum().item() / live - 1) if live > 0 else 1.0
        mode[chosen], weight[chosen], turn[chosen] = Mode.WEIGHTS, factor, update
    return Plan(mode, weight, turn=turn if updates > 1 else None)
