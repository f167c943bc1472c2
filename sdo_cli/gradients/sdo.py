"""``sdo`` and ``sdo-0``: Shortcut Diffusion Optimization (Dou et al., arXiv 2505.07477).

Each sample keeps the graph of one randomly chosen network call; from there to the image goes the solver's
linear path. With true weights 1/p the gradient is unbiased for the sum over all calls

    Σ_i w_i (∂ε_θ(sg(x_i), t_i)/∂θ)ᵀ g,        g = ∂J/∂x_N.

For a latent that is optimised, the first call follows its input: A_0 g + w_0 (∂ε_θ/∂x_0)ᵀ g.
"""

import torch
from torch import Tensor

from sdo_cli.gradients.choice import dealt, inclusion, independent, systematic
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
    weights: str = "true/p",
    as_epsilon: bool = False,
    updates: int = 1,
) -> Plan:
    """One (or K) calls per sample, input detached; of several updates on one rollout, other calls in each.

    Args:
        step_choice: which calls: ``stratified`` (over the batch each comes up as evenly as it can), ``uniform`` (drawn
            for each sample by itself), ``per-batch`` (one draw for all samples), ``weight-proportional`` (likelier
            where the solver's weight is larger, p ∝ |w_i|), ``late-biased`` (p ∝ i + 1), ``first``, ``last``, or
            ``fixed``.
        steps_per_sample: K, how many distinct calls of each sample; all of them is the full sum.
        step: the call of step_choice ``fixed``, 0 the noisiest.
        weights: what a call's gradient is multiplied with: ``true/p`` the solver's weight w_i by 1/p_i (unbiased),
            ``plain`` w_i alone, ``unit`` the mean of all |w_i| by 1/p_i, so that every call counts alike; ``root`` the
            middle of ``true/p`` and ``unit``: the root of |w_i| times that mean, with the sign of w_i, by 1/p_i.
        as_epsilon: hold ε constant along the linear path instead of the network's native output (for v-networks).
    """
    turns = None
    if as_epsilon:
        coefficients = coefficients.in_epsilon()
    if step_choice in ("first", "last", "fixed"):
        chosen = {"first": 0, "last": calls - 1, "fixed": step}[step_choice]
        if chosen is None or not 0 <= chosen < calls:
            raise ValueError(f"step_choice fixed needs step in 0 … {calls - 1}, not {step}")
        p = torch.zeros(calls, dtype=torch.float64)
        p[chosen] = 1.0
        rows = torch.full((1, batch), chosen)
    else:
        if not 1 <= steps_per_sample <= calls:
            raise ValueError(f"steps_per_sample must be in 1 … {calls}, not {steps_per_sample}")
        if steps_per_sample * updates > calls:
            raise ValueError(
                f"updates must be at most {calls // steps_per_sample}, not {updates}: so many calls are there"
            )
        odds = torch.ones(calls, dtype=torch.float64)
        if step_choice == "weight-proportional":
            odds = torch.tensor(coefficients.w, dtype=torch.float64).abs()
        elif step_choice == "late-biased":
            odds = torch.arange(1, calls + 1, dtype=torch.float64)
        # all updates' together; each of them has its share of the probability
        p = inclusion(odds, steps_per_sample * updates)
        if step_choice == "uniform":
            rows = independent(calls, batch, steps_per_sample * updates, generator)
        else:
            rows = systematic(p, 1 if step_choice == "per-batch" else batch, generator)
        turns = dealt(rows, updates, generator).expand(-1, batch) if updates > 1 else None
        p, rows = p / updates, rows.expand(-1, batch)
    mode, weight = empty(calls, batch)
    mode.scatter_(0, rows, Mode.WEIGHTS)
    # nothing live stands before the first call: its input may be followed, which serves latents
    mode[0, mode[0] > 0] = Mode.THROUGH
    factor = _factor(weights, p, coefficients)
    turn = None if turns is None else torch.zeros_like(mode).scatter_(0, rows, turns)
    return Plan(mode, torch.where(mode > 0, factor[:, None], weight), as_epsilon=as_epsilon, turn=turn)


def _factor(weights: str, p: Tensor, coefficients: Coefficients) -> Tensor:
    """What each call's gradient is multiplied with when it is chosen, ``[calls]``."""
    inverse = torch.where(p > 0, 1 / p, 0.0)
    if weights == "plain":
        return torch.ones_like(p)
    if weights == "true/p":
        return inverse
    size = torch.tensor(coefficients.w, dtype=torch.float64).abs()
    even = torch.where(size > 0, size.mean() / size, 0.0)
    return inverse * (even.sqrt() if weights == "root" else even)


def sdo_0(calls: int, batch: int, coefficients: Coefficients, generator: torch.Generator) -> Plan:
    """No network call live: the linear path alone, ``A_0 g`` for a latent. The control of SDO's network term."""
    del coefficients, generator
    return Plan(*empty(calls, batch))
