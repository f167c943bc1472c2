"""``bridge``: late-biased calls of a cached rollout, one of them bridged to those before (FlowBP-Bridge, arXiv
2606.11075)."""

from dataclasses import replace

import torch

from sdo_cli.gradients.flowbp import flowbp_sparse
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.sampling.coefficients import Coefficients


def bridge(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    k: int = 5,
    late_bias: float = 4.0,
    alpha: float = 0.5,
    rescale: float = 0.5,
) -> Plan:
    """As ``flowbp-sparse``, and at one of the calls, a random one but the first, the gradient also goes on through its
    input to the live calls before it: one Jacobian of the network deep, and no deeper.

    Args:
        k: how many calls, the bridge among them.
        late_bias: call i has the odds (i + 1)^late_bias.
        alpha: what passes the bridge's Jacobian is multiplied with; 0 is ``flowbp-sparse``.
        rescale: as ``flowbp-sparse``'s.
    """
    plan = flowbp_sparse(calls, batch, coefficients, generator, k=k, late_bias=late_bias, rescale=rescale)
    live = plan.live[:, 0].nonzero()[:, 0]
    if len(live) < 2:
        return plan
    j = live[int(torch.randint(1, len(live), (1,), generator=generator))]
    mode, nested = plan.mode.clone(), torch.ones_like(plan.weight)
    # the other calls' own factor stands for frozen ones; what they send through the bridge is theirs too
    mode[j], nested[j] = Mode.THROUGH, alpha
    return replace(plan, mode=mode, nested=nested)
