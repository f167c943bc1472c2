"""``lagrange``: two live calls that stand for all by interpolation (FlowBP-Lagrange, arXiv 2606.11075)."""

import torch

from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.sampling.coefficients import Coefficients


def lagrange(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    order: int = 3,
    alpha: float = 0.1,
    gap: float = 0.2,
) -> Plan:
    """Outputs of frozen calls are taken for a polynomial through those of two live calls and of the cached ones between
    and around them, so that a live call also carries what it adds to theirs: ``W_l = w_l + Σ_frozen w_i L_l(i)`` with
    Lagrange's basis ``L`` over the numbers of the calls.

    The same two calls for the whole batch, at random; the later one's gradient also goes on through its input.

    Args:
        order: of the polynomial, 1 … 3: order - 1 cached calls support it beside the live ones, the first and the
            last.
        alpha: what passes the later call's Jacobian is multiplied with; 0 detaches its input.
        gap: the live calls are at least this share of the calls apart, and from the cached ones half of it, where
            there is room: near ones would weigh wildly.
    """
    cached = {1: [], 2: [0], 3: [0, calls - 1]}[order]
    mode, weight = empty(calls, batch)
    pair = _pair(calls, cached, gap, generator)
    w = torch.tensor(coefficients.w, dtype=torch.float64)
    supports = torch.tensor(sorted({*pair, *cached}), dtype=torch.float64)
    frozen = [i for i in range(calls) if i not in supports.long().tolist()]
    for number in pair:
        others = supports[supports != number]
        basis = [float(((i - others) / (number - others)).prod()) for i in frozen]
        total = float(w[number]) + sum(float(w[i]) * value for i, value in zip(frozen, basis, strict=True))
        # the engine multiplies with the solver's own weight
        mode[number], weight[number] = Mode.WEIGHTS, total / float(w[number]) if w[number] else 0.0
    nested = torch.ones_like(weight)
    if alpha > 0 and len(pair) == 2:
        mode[pair[1]], nested[pair[1]] = Mode.THROUGH, alpha
    return Plan(mode, weight, nested=nested)


def _pair(calls: int, cached: list[int], gap: float, generator: torch.Generator) -> list[int]:
    """Two calls, rising; fewer where there are no two."""
    free = [i for i in range(calls) if i not in cached] or [0]
    for apart in (gap, gap / 2, 0.0):
        far = [
            (a, b)
            for a in free
            for b in free
            if b - a >= max(1, apart * calls) and all(min(abs(a - c), abs(b - c)) >= apart / 2 * calls for c in cached)
        ]
        if far:
            return list(far[int(torch.randint(len(far), (1,), generator=generator))])
    return free[:1]
