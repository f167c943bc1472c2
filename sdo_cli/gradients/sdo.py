"""``sdo``: Shortcut Diffusion Optimization (Dou et al., arXiv 2505.07477).

Each sample keeps the graph of one randomly chosen network call; from there to the image goes the solver's
linear path. With true weights 1/p the gradient is unbiased for the sum over all calls

    Σ_i w_i (∂ε_θ(sg(x_i), t_i)/∂θ)ᵀ g,        g = ∂J/∂x_N.
"""

import torch
from torch import Tensor

from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.sampling.coefficients import Coefficients


def sdo(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    step_choice: str = "stratified",
    steps_per_sample: int = 1,
    step: int | None = None,
) -> Plan:
    """One (or K) calls per sample, input detached.

    Args:
        step_choice: ``stratified`` over the batch, ``uniform``, ``first``, ``last`` or ``fixed``.
        steps_per_sample: K; each sample's K calls are distinct, K = ``calls`` is the full sum.
        step: the call of ``fixed``.
    """
    del coefficients
    mode, weight = empty(calls, batch)
    if step_choice in ("first", "last", "fixed"):
        chosen = {"first": 0, "last": calls - 1, "fixed": step}[step_choice]
        if chosen is None or not 0 <= chosen < calls:
            raise ValueError(f"step_choice fixed needs step in 0 … {calls - 1}, not {step}")
        mode[chosen], weight[chosen] = Mode.WEIGHTS, 1.0
        return Plan(mode, weight)
    if not 1 <= steps_per_sample <= calls:
        raise ValueError(f"steps_per_sample must be in 1 … {calls}, not {steps_per_sample}")
    draw = {"stratified": _stratified, "uniform": _uniform}[step_choice]
    rows = draw(calls, batch, steps_per_sample, generator)
    mode.scatter_(0, rows, Mode.WEIGHTS)
    # every call is included with probability K / calls
    weight.scatter_(0, rows, calls / steps_per_sample)
    return Plan(mode, weight)


def _stratified(calls: int, batch: int, k: int, generator: torch.Generator) -> Tensor:
    """Systematic sampling: K evenly spaced calls per sample, their offsets stratified over the batch. ``[K, B]``"""
    strata = torch.randperm(batch, generator=generator, dtype=torch.long).double()
    offset = (strata + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch
    position = (torch.arange(k, dtype=torch.float64)[:, None] + offset[None]) / k
    return (position * calls).long().clamp(max=calls - 1)


def _uniform(calls: int, batch: int, k: int, generator: torch.Generator) -> Tensor:
    """K distinct calls per sample, independent between samples. ``[K, B]``"""
    order = torch.rand(calls, batch, generator=generator, dtype=torch.float64).argsort(0)
    return order[:k]
