"""The affine identity of deterministic solvers (docs/architecture.md, notation).

    x_N = A_0 x_0 + Σ_i w_i e_i

``e_i`` is the network's native output at its i-th call. The N+1 scalars depend on solver and N only.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.solvers import fresh

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Coefficients:
    """Attributes:
    A: what ``x_0`` is multiplied with (``x_0`` already scaled by ``init_noise_sigma``).
    w: one weight per network CALL (PNDM makes N+1 calls for N steps), noisiest first.
    """

    A: float
    w: tuple[float, ...]

    @property
    def calls(self) -> int:
        return len(self.w)


@torch.enable_grad()
def affine_coefficients(scheduler: "SchedulerMixin", num_inference_steps: int) -> Coefficients:
    """Run the stock scheduler under autograd on a ``[1, 1, 1, 1]`` float64 tensor and read off the gradients."""
    solver = fresh(scheduler, num_inference_steps)
    calls = len(solver.timesteps)
    # the values do not matter to an affine map; distinct ones make sure of it in the check below
    x0 = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    outputs = [torch.full_like(x0, 0.1 + 0.01 * i).requires_grad_() for i in range(calls)]
    x = x0
    for t, e in zip(solver.timesteps, outputs, strict=True):
        x = solver.step(e, t, x).prev_sample
    gradients = torch.autograd.grad(x.sum(), [x0, *outputs], allow_unused=True)
    values = [0.0 if g is None else g.item() for g in gradients]
    rebuilt = values[0] * x0.item() + sum(w * e.item() for w, e in zip(values[1:], outputs, strict=True))
    if abs(rebuilt - x.item()) > 1e-4 * max(1.0, abs(x.item())):
        raise SolverFault(
            f"{type(scheduler).__name__} is not affine in the network's outputs",
            remedy="choose another solver",
        )
    return Coefficients(A=values[0], w=tuple(values[1:]))


@lru_cache(maxsize=32)
def _cached(class_name: str, config: str, num_inference_steps: int) -> Coefficients:
    import diffusers

    scheduler = getattr(diffusers, class_name).from_config(json.loads(config))
    return affine_coefficients(scheduler, num_inference_steps)


def coefficients_of(scheduler: "SchedulerMixin", num_inference_steps: int) -> Coefficients:
    """Like :func:`affine_coefficients`, computed once per (solver, N)."""
    return _cached(type(scheduler).__name__, scheduler.to_json_string(), num_inference_steps)
