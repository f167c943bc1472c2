"""The one denoising loop. Sampling, every gradient rule and every engine run through it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdo_cli.sampling.coefficients import Coefficients, coefficients_of
from sdo_cli.sampling.solvers import fresh

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# denoise(x_scaled [R,…], t [R], rows [R]) -> e [R,…], after guidance
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# call_network(i, x_scaled, t) -> e; decides how gradients flow at call i
CallNetwork = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Path:
    """A way from noise to the final latent: solver, number of steps, denoiser, starting point.

    Attributes:
        x_0: initial noise ``[B, C, h, w]``, already times ``init_noise_sigma``.
    """

    scheduler: "SchedulerMixin"
    num_inference_steps: int
    denoise: Denoise
    x_0: Tensor

    @property
    def coefficients(self) -> Coefficients:
        return coefficients_of(self.scheduler, self.num_inference_steps)

    @property
    def rows(self) -> Tensor:
        return torch.arange(self.x_0.shape[0], device=self.x_0.device)


def denoise_path(path: Path, call_network: CallNetwork) -> Tensor:
    """From ``x_0`` to ``x_N``; ``call_network`` is asked for ``e_i`` at every call, in order."""
    solver = fresh(path.scheduler, path.num_inference_steps)
    x, dtype = path.x_0, path.x_0.dtype
    for i, t in enumerate(solver.timesteps):
        scaled = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        e = call_network(i, scaled, t.to(x.device).expand(x.shape[0]))
        # some schedulers compute in float32 whatever they are given
        x = solver.step(e, t, x).prev_sample.to(dtype)
    return x


@torch.no_grad()
def sample_latents(path: Path) -> Tensor:
    """``x_N`` without any graph."""
    rows = path.rows
    return denoise_path(path, lambda i, x, t: path.denoise(x, t, rows))
