"""``leapalign``: two leaps from a call to the image (LeapAlign, arXiv 2604.15311)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.sampling.coefficients import Coefficients


def leapalign(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    alpha: float = 0.3,
) -> Plan:
    """Two random calls k < j, the same for the whole batch: one long step from k to j, one from j to the image, each as
    a first-order solver would take it, with the true latents as their values. The gradient goes from the image to both
    calls' weights, and through the network at j on to k.

    The steps hold ε constant (velocity for flow networks). The authors also weigh samples by how near the leaps come to
    the true latents; here all count alike.

    Args:
        alpha: what passes the Jacobian at j is multiplied with.

    Raises:
        ValueError: coefficients without a route, whose noise levels are needed.
    """
    route = coefficients.route
    if route is None:
        raise ValueError("leapalign needs the solver's noise levels, which coefficients without a route do not have")
    levels, end = route.levels, route.end
    flow = levels[0].alpha + levels[0].sigma == 1.0
    mode, weight = empty(calls, batch)
    nested = torch.ones_like(weight)
    own = (coefficients if flow else coefficients.in_epsilon()).w

    def leap(i: int, alpha_j: float, sigma_j: float) -> tuple[float, float]:
        """Of the latent and of the output at call i, in the latent at a level."""
        here = levels[i]
        if flow:
            return 1.0, sigma_j - here.sigma
        # x = α_j/α_i (x_i - σ_i ε) + σ_j ε, and ε is eps_of_e times the output when x is held
        return alpha_j / here.alpha, (sigma_j - here.sigma * alpha_j / here.alpha) * here.eps_of_e

    *before, j = sorted(torch.randperm(calls, generator=generator)[:2].tolist())
    keeps, last = leap(j, *end)
    mode[j], weight[j], nested[j] = Mode.WEIGHTS, _over(last, own[j]), alpha
    for k in before:
        _, first = leap(k, levels[j].alpha, levels[j].sigma)
        mode[j], mode[k], weight[k] = Mode.THROUGH, Mode.WEIGHTS, _over(keeps * first, own[k])
    return Plan(mode, weight, nested=nested, as_epsilon=not flow and any(level.eps_of_x for level in levels))


def _over(wanted: float, own: float) -> float:
    """What the solver's own weight, which the engine multiplies with, has to be multiplied with."""
    return wanted / own if own else 0.0
