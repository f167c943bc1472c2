"""Signal and noise at a network call, and what the network's output says about image and noise there.

    x = α x0 + σ ε

x0 and ε are affine in the latent x and the native output e, with coefficients that depend on what the network
predicts: ε, v (Salimans & Ho 2022, arXiv 2202.00512), the sample itself, or a flow velocity (ε - x0).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


# their timesteps are places in alphas_cumprod
BY_TIMESTEP = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler")
# their sigmas are σ/α, and latents are scaled to α = 1
VARIANCE_EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "IPNDMSigmaScheduler",
    "LearnedMultistepScheduler",
)


@dataclass(frozen=True)
class Level:
    """Attributes:
    alpha, sigma: ``x = α x0 + σ ε`` in the solver's own scaling of latents.
    scale: the network sees ``scale · x``.
    x0_of_x, x0_of_e: ``x0 = x0_of_x · x + x0_of_e · e``.
    eps_of_x, eps_of_e: ``ε = eps_of_x · x + eps_of_e · e``.
    """

    alpha: float
    sigma: float
    scale: float
    x0_of_x: float
    x0_of_e: float
    eps_of_x: float
    eps_of_e: float


def make_level(alpha: float, sigma: float, prediction: str) -> Level:
    """A level for a network that predicts ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``."""
    # v is defined for latents of variance one; Euler's have α² + σ² > 1 and are scaled down before the network
    r = 1.0 if prediction == "flow_prediction" else (alpha**2 + sigma**2) ** 0.5
    affine = {
        "epsilon": lambda: (1 / alpha, -sigma / alpha, 0.0, 1.0),
        "v_prediction": lambda: (alpha / r**2, -sigma / r, sigma / r**2, alpha / r),
        "sample": lambda: (0.0, 1.0, 1 / sigma, -alpha / sigma),
        "flow_prediction": lambda: (1.0, -sigma, 1.0, 1 - sigma),
    }
    return Level(alpha, sigma, 1 / r, *affine[prediction]())


def levels_of(scheduler: "SchedulerMixin", timesteps: Tensor, start: int) -> tuple[Level, ...]:
    """The level of every call of a scheduler whose timesteps are set."""
    flow = _is_flow(scheduler)
    prediction = "flow_prediction" if flow else scheduler.config.prediction_type
    if type(scheduler).__name__ in BY_TIMESTEP:
        signal = scheduler.alphas_cumprod.double()[timesteps.cpu().long()].tolist()
        return tuple(make_level(a**0.5, (1 - a) ** 0.5, prediction) for a in signal)
    return tuple(make_level(*_split(scheduler, s), prediction) for s in scheduler.sigmas[start:-1].double().tolist())


def end_of(scheduler: "SchedulerMixin") -> tuple[float, float]:
    """α and σ of the final latent of a scheduler whose timesteps are set."""
    name = type(scheduler).__name__
    if name == "LCMScheduler":
        return _end_of_lcm(scheduler)
    if name in BY_TIMESTEP:
        # DDPM ends at the image, TCD at the first training timestep
        ends: dict[str, Any] = {"DDPMScheduler": 1.0, "TCDScheduler": scheduler.alphas_cumprod[0]}
        a = float(ends[name]) if name in ends else float(scheduler.final_alpha_cumprod)
        return a**0.5, (1 - a) ** 0.5
    return _split(scheduler, float(scheduler.sigmas[-1]))


def _end_of_lcm(scheduler: Any) -> tuple[float, float]:
    """The consistency function of the last call: c_out x0 + c_skip x."""
    t = scheduler.timesteps[-1]
    skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(t))
    a = float(scheduler.alphas_cumprod[t])
    return out + skip * a**0.5, skip * (1 - a) ** 0.5


def _is_flow(scheduler: "SchedulerMixin") -> bool:
    return "FlowMatch" in type(scheduler).__name__


def _split(scheduler: "SchedulerMixin", s: float) -> tuple[float, float]:
    """α and σ behind an entry of ``scheduler.sigmas``."""
    if _is_flow(scheduler):
        return 1 - s, s
    if type(scheduler).__name__ in VARIANCE_EXPLODING:
        return 1.0, s
    # DPM-Solver++, UniPC, DEIS: sigmas are σ/α of latents of variance one
    return (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5
