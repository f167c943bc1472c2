"""From a picture to the latent that makes it: a one-step solver walked backwards.

    x_{i+1} = a_i x_i + b_i e(x_i)     is solved for x_i by     x ← (x_{i+1} - b_i e(x)) / a_i

DDIM inversion (Song et al. 2020, arXiv 2010.02502) takes one such iteration and e at the wrong point; more of them
(AIDI, arXiv 2309.04907) make the step exact where they converge, also under guidance.
"""

import torch
from torch import Tensor

from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import Path

# relative change of a step that is as good as none
CONVERGED = 1e-6


@torch.no_grad()
def invert(path: Path, x_N: Tensor, *, iterations: int) -> Tensor:
    """The latent ``[B, …]`` at the path's start whose trajectory ends at ``x_N``, as nearly as was found.

    Args:
        path: of a one-step solver without injected noise; its own ``x_0`` is not looked at.
        iterations: at most, per step; of these the one that fits best is kept, sample by sample.
    """
    route, rows, x = path.route, path.rows, x_N
    timesteps, w = route.begin()[1], path.coefficients.w
    starts = [coefficients_of(route.from_step(route.start + i)).A for i in range(route.calls)] + [1.0]
    for i in reversed(range(route.calls)):
        a, b = starts[i] / starts[i + 1], w[i] / starts[i + 1]
        t = timesteps[i].to(x.device).expand(len(x))
        x = _solved(path, x, a, b, t, rows, route.levels[i].scale, iterations)
    return x


def _solved(
    path: Path, after: Tensor, a: float, b: float, t: Tensor, rows: Tensor, scale: float, iterations: int
) -> Tensor:
    """``x`` with ``a x + b e(x) = after``."""
    # e at the later point, as plain DDIM inversion takes it
    x = (after - b * path.denoise(scale * after, t, rows)) / a
    best, error = x, torch.full((len(x),), torch.inf, device=x.device)
    for _ in range(iterations):
        again = (after - b * path.denoise(scale * x, t, rows)) / a
        change = (again - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-12)
        nearer = change < error
        best = torch.where(nearer.view(-1, *[1] * (x.dim() - 1)), x, best)
        error = torch.where(nearer, change, error)
        if bool((error < CONVERGED).all()):
            break
        x = again
    return best
