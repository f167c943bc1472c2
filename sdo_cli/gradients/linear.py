"""The linear path of a plan: what carries g from the reward's latent back to every call and to ``x_0``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.route import Route


@dataclass(frozen=True)
class LinearPath:
    """Attributes (float64, on the CPU):
    factor: ``[calls, B]``, solver weight times the plan's weight: a live call receives ``factor · g``.
    identity: ``[B]``, what ``x_0`` receives of g beside the network: A, and the input of a followed call in ε.
    w: ``[calls, B]``, the solver's weights alone: guidance scales receive ``w · <g, e_cond - e_uncond>``.
    noise: ``[calls, B]``: noise injected after a call receives ``noise · g``.
    """

    factor: Tensor
    identity: Tensor
    w: Tensor
    noise: Tensor


def linear_path(route: Route, plan: Plan, sources: Sequence[int] | None = None) -> LinearPath:
    """Solver weights of every sample's own endpoint, times the plan's weights.

    Args:
        sources: per call the one whose output it hands out again, when gradients are those of such a sampler.
    """
    w, noise = torch.zeros_like(plan.weight), torch.zeros_like(plan.weight)
    identity = torch.zeros(plan.batch, dtype=torch.float64)
    for endpoint in plan.ends.unique().tolist():
        stop = None if endpoint == plan.calls else endpoint
        c = coefficients_of(route, endpoint=stop, as_epsilon=plan.as_epsilon)
        if sources is not None:
            c = replace(c.merged(sources), noise=c.noise, through=c.through)
        mine = plan.ends == endpoint
        w[:, mine] = torch.tensor(c.w, dtype=torch.float64)[:, None]
        noise[:, mine] = torch.tensor(c.noise, dtype=torch.float64)[:, None]
        followed = (plan.mode[0] == Mode.THROUGH)[mine] * plan.weight[0, mine]
        identity[mine] = c.A + c.through[0] * followed
    return LinearPath(w * plan.weight, identity, w, noise)
