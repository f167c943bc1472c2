"""A small smooth network in float64 that stands in for a UNet, and paths over it."""

import copy

import torch
from torch import nn

from sdo_cli.gradients.outcome import Scored
from sdo_cli.sampling.guidance import Guided
from sdo_cli.sampling.loop import Path
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import make_scheduler

EPS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CONFIGS = {
    "ddim": ("ddim", EPS),
    "ddim-v": ("ddim", EPS | {"prediction_type": "v_prediction"}),
    "pndm": ("pndm", EPS),
    "unipc": ("unipc", EPS),
    "deis": ("deis", EPS),
    "euler": ("euler", EPS),
    "dpm++2m": ("dpm++2m", EPS),
    "dpm++2m-karras": ("dpm++2m-karras", EPS),
    "ipndm": ("ipndm", EPS),
    "ddpm": ("ddpm", EPS),
    "euler-a": ("euler-a", EPS),
    "lcm": ("lcm", EPS),
    "tcd": ("tcd", EPS),
    "flow-euler": ("flow-euler", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
}
# schedulers whose step() casts to float32
TOLERANCE = dict.fromkeys(CONFIGS, 1e-9) | dict.fromkeys(
    ("euler", "euler-a", "ipndm", "dpm++2m", "dpm++2m-karras", "flow-euler"), 2e-6
)


class Toy(nn.Module):
    """e = W2 tanh(W1 [x, c] + u t), on latents [B, 2, 3, 3]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(0.3 * torch.randn(18, 24, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(0.3 * torch.randn(18, 18, generator=generator, dtype=torch.float64))
        self.time = nn.Parameter(torch.randn(18, generator=generator, dtype=torch.float64))

    def shifted(self):
        """Another network nearby: what the tuned one is kept close to."""
        with torch.no_grad():
            self.second.mul_(0.9)
        return self

    def forward(self, x, t, condition):
        flat = torch.cat([x.flatten(1), condition["c"]], 1)
        hidden = torch.tanh(flat @ self.first.T + self.time * (t.to(x.dtype) / 1000)[:, None])
        return (hidden @ self.second.T).view_as(x)


# trained with zero terminal SNR: nothing is left of the image at the first call
ZERO_SNR = EPS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def toy_path(solver="ddim", steps=8, batch=4, scale=1.0, net=None, eta=0.0, start=0, config=None):
    """``config`` is the model's, in place of the solver's in ``CONFIGS``."""
    name, config = (CONFIGS[solver][0], config or CONFIGS[solver][1])
    scheduler = make_scheduler(name, config, steps)
    generator = torch.Generator().manual_seed(7)
    x_0 = torch.randn(batch, 2, 3, 3, generator=generator, dtype=torch.float64)
    condition = {"c": torch.randn(batch, 6, generator=generator, dtype=torch.float64)}
    negative = {"c": torch.zeros(batch, 6, dtype=torch.float64)}
    net = net or Toy()
    x_0 = x_0 * getattr(scheduler, "init_noise_sigma", 1.0)
    route = Route(scheduler, steps, start, eta)
    noise = torch.randn(route.calls, *x_0.shape, generator=generator, dtype=torch.float64)
    injected = noise if route.takes_noise else None
    base = Guided(copy.deepcopy(net).shifted(), condition, negative, scale)
    return net, Path(route, Guided(net, condition, negative, scale), x_0, injected, base)


def objective(x_N, rows):
    """A smooth loss that differs between samples."""
    target = (rows.to(x_N.dtype) / 5)[:, None]
    loss = torch.log1p((x_N.flatten(1) - target).square().mean(1))
    return Scored(loss, {"toy": -loss.detach()})


def grads(net):
    values = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    return values
