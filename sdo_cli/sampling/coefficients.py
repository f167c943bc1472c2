"""The affine identity of solvers (docs/architecture.md, notation).

    x_N = A_0 x_0 + Σ_i w_i e_i + Σ_i n_i z_i

``e_i`` is the network's native output at its i-th call, ``z_i`` the noise injected when η > 0. The scalars depend on
the route only. A walk that ends with the x0-prediction at call m is affine in the same way.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.route import Route, walk


@dataclass(frozen=True)
class Coefficients:
    """Attributes:
    A: what the first latent is multiplied with (``x_0`` already scaled by ``init_noise_sigma``).
    w: one weight per network CALL (PNDM makes N+1 calls for N steps), noisiest first; 0 after the endpoint.
    noise: one per call, of the injected noise; all 0 when η = 0.
    through: what a call adds to the linear path when its input is followed; 0 unless the path is held in ε.
    route: where they come from.
    """

    A: float
    w: tuple[float, ...]
    noise: tuple[float, ...] = ()
    through: tuple[float, ...] = ()
    route: Route | None = field(default=None, compare=False)

    @property
    def calls(self) -> int:
        return len(self.w)

    def merged(self, sources: Sequence[int]) -> "Coefficients":
        """Those of a sampler whose call j hands out the output of call ``sources[j]``: that one gets both weights.

        Raises:
            ValueError: noise is injected, or the path is held in ε; neither is one output's any more.
        """
        if any(self.noise) or any(self.through):
            raise ValueError("repeated outputs need a deterministic route, held constant in the native output")
        w = [0.0] * self.calls
        for source, weight in zip(sources, self.w, strict=True):
            w[source] += weight
        return Coefficients(self.A, tuple(w))

    def in_epsilon(self) -> "Coefficients":
        """Those of the linear path that holds ε constant instead of the native output; ``w`` still multiplies e."""
        if self.route is None:
            raise ValueError("coefficients without a route cannot be put into ε")
        return coefficients_of(self.route, as_epsilon=True)


@torch.enable_grad()
def affine_coefficients(route: Route, *, endpoint: int | None = None, as_epsilon: bool = False) -> Coefficients:
    """Run the stock scheduler under autograd on a ``[1, 1, 1, 1]`` float64 tensor and read off the gradients.

    Args:
        endpoint: end with the x0-prediction at this call instead of ``x_N``.
        as_epsilon: take ε_i = n_x x_i + n_e e_i as what is held constant.

    Raises:
        SolverFault: not affine, or ε does not determine the output at some call.
    """
    levels, calls = route.levels, route.calls
    if as_epsilon and any(abs(level.eps_of_e) < 1e-6 for level in levels):
        raise SolverFault(
            f"{type(route.scheduler).__name__} begins with pure noise, where ε says nothing about the output",
            remedy="leave as_epsilon out",
        )
    # the values do not matter to an affine map; distinct ones make sure of it in the check below
    x0 = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    outputs = [torch.full_like(x0, 0.1 + 0.01 * i).requires_grad_() for i in range(calls)]
    injected = torch.full((calls, 1, 1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)

    def call(i: int, scaled: Tensor, t: Tensor) -> Tensor:
        del t
        if not as_epsilon:
            return outputs[i]
        return (outputs[i] - levels[i].eps_of_x * scaled / levels[i].scale) / levels[i].eps_of_e

    stop = None if endpoint is None else torch.tensor([endpoint])
    x = walk(route, x0, call, injected=injected, endpoint=stop)
    inputs = [x0, *outputs, injected]
    gradients = torch.autograd.grad(x.sum(), inputs, allow_unused=True)
    parts = [torch.zeros_like(value) if g is None else g for g, value in zip(gradients, inputs, strict=True)]
    rebuilt = sum((g * value).sum().item() for g, value in zip(parts, inputs, strict=True))
    # `not <=` also catches NaN
    if not abs(rebuilt - x.item()) <= 1e-4 * max(1.0, abs(x.item())):
        raise SolverFault(
            f"{type(route.scheduler).__name__} is not affine in the network's outputs",
            remedy="choose another solver",
        )
    w = [g.item() for g in parts[1:-1]]
    by_e = [level.eps_of_e if as_epsilon else 1.0 for level in levels]
    by_x = [level.eps_of_x if as_epsilon else 0.0 for level in levels]
    return Coefficients(
        A=parts[0].item(),
        w=tuple(a * b for a, b in zip(w, by_e, strict=True)),
        noise=tuple(parts[-1].flatten().tolist()),
        through=tuple(a * b for a, b in zip(w, by_x, strict=True)),
        route=route,
    )


@lru_cache(maxsize=512)
def _cached(
    kind: Any, config: str, steps: tuple[int, int, float, tuple[int, ...] | None], endpoint: int | None, eps: bool
) -> Coefficients:
    scheduler = kind.from_config(json.loads(config))
    return affine_coefficients(Route(scheduler, *steps), endpoint=endpoint, as_epsilon=eps)


def coefficients_of(route: Route, *, endpoint: int | None = None, as_epsilon: bool = False) -> Coefficients:
    """Like :func:`affine_coefficients`, computed once per route."""
    scheduler = route.scheduler
    return _cached(
        scheduler.__class__,
        scheduler.to_json_string(),
        (route.num_inference_steps, route.start, route.eta, route.timesteps),
        endpoint,
        as_epsilon,
    )
