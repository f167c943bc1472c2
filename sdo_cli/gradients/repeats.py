"""Repeats of the last call on re-noised images, each a path and a plan of its own (DRaFT-LV)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.sampling.loop import Path


def repeated(path: Path, plan: Plan, x_N: Tensor) -> Iterator[tuple[Path, Plan]]:
    """For every row of ``plan.repeats`` the last step begun from ``α sg(x_N) + σ ε``, ended by its x0-prediction.

    The noise of each (repeat, sample) has the plan's own seed, so that draws do not depend on the batch.
    """
    route = path.route.from_step(path.route.num_inference_steps - 1)
    level = route.levels[0]
    for seeds in plan.repeats if plan.repeats is not None else ():
        noise = torch.stack(
            [
                torch.randn(x_N.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=x_N.dtype)
                for seed in seeds.tolist()
            ]
        )
        renoised = level.alpha * x_N.detach() + level.sigma * noise.to(x_N.device)
        again = Plan(
            torch.full((1, plan.batch), Mode.WEIGHTS),
            plan.weight[-1:],
            endpoint=torch.zeros(plan.batch, dtype=torch.long),
            as_epsilon=plan.as_epsilon,
        )
        # the last step of a noisy solver adds none
        none = torch.zeros_like(path.injected[-1:]) if route.takes_noise and path.injected is not None else None
        yield replace(path, route=route, x_0=renoised, injected=none, skips=None), again
