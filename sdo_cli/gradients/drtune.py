"""``drtune``: deep reward tuning (Wu et al. 2024, arXiv 2405.00760)."""

from dataclasses import replace

import torch

from sdo_cli.gradients.choice import dealt
from sdo_cli.gradients.plan import Mode, Plan, plan_of
from sdo_cli.sampling.coefficients import Coefficients


def drtune(
    calls: int,
    batch: int,
    coefficients: Coefficients,
    generator: torch.Generator,
    *,
    k: int = 3,
    early_stop: float = 0.4,
    updates: int = 1,
) -> Plan:
    """Equally spaced calls with a random offset, the input of each detached, true solver weights.

    Args:
        k: how many calls.
        early_stop: share of the calls, from the end, among which sampling stops at a random one and the reward
            sees its x0-prediction; the ``k`` calls are spaced over what is sampled. 0 samples to the end.
    """
    del coefficients
    late = min(calls, round(calls * early_stop))
    stop = calls - int(torch.randint(1, late + 1, (1,), generator=generator)) if late else None
    length = calls if stop is None else stop + 1
    count = min(k * updates, length)
    stride = length // count
    offset = int(torch.randint(length - (count - 1) * stride, (1,), generator=generator))
    live = [offset + j * stride for j in range(count)]
    plan = plan_of(calls, batch, live, Mode.WEIGHTS, endpoint=stop)
    if updates == 1:
        return plan
    # every update's calls are equally spaced too
    turn = torch.zeros_like(plan.mode)
    turn[live] = dealt(torch.tensor(live)[:, None], updates, generator)
    return replace(plan, turn=turn)
