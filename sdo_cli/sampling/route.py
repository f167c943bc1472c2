"""A solver's way from noise to the final latent, as a stock scheduler walks it. Everything runs through ``walk``."""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.levels import Level, end_of, levels_of
from sdo_cli.sampling.timesteps import check_timesteps, set_timesteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# schedulers that inject noise whatever eta is
NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")

# call_network(i, x_scaled, t) -> e; decides how gradients flow at call i
CallNetwork = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Route:
    """Attributes:
    start: solver step to begin at, 0 the noisiest. A multistep solver starts there without history.
    eta: DDIM's noise, or TCD's gamma, 0 … 1 (0 is deterministic).
    timesteps: training timesteps in place of the solver's own, falling, one per step; the scheduler is then one that
        :func:`~sdo_cli.sampling.solvers.make_scheduler` made for them.

    Raises:
        SolverFault: timesteps with noise, or that are no way from noise to image.
    """

    scheduler: "SchedulerMixin"
    num_inference_steps: int
    start: int = 0
    eta: float = 0.0
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.timesteps is None:
            return
        check_timesteps(self.timesteps, self.num_inference_steps, self.scheduler)
        if self.eta > 0 and "eta" not in _step_takes(self.scheduler.__class__):
            name = type(self.scheduler).__name__
            raise SolverFault(f"eta {self.eta:g} with timesteps: {name} adds no noise at them", remedy="write 0")

    def begin(self) -> tuple["SchedulerMixin", Tensor]:
        """A scheduler with no history (they are stateful: every walk needs its own) and the timestep of every call,
        both on the CPU."""
        # a copy takes a tenth of what making one does
        new = copy.deepcopy(self._unused)
        if self.start == 0:
            return new, new.timesteps
        if hasattr(new, "set_begin_index"):
            new.set_begin_index(self.start)
            return new, new.timesteps[self.start :]
        if not hasattr(new, "plms_timesteps"):
            return new, new.timesteps[self.start :]
        # PNDM's first step takes two calls, the second at the next timestep: a restart does so again
        steps = list(dict.fromkeys(new.timesteps.tolist()))[self.start :]
        new.timesteps = torch.tensor(steps[:2] + steps[1:], device=new.timesteps.device)
        return new, new.timesteps

    @cached_property
    def _unused(self) -> "SchedulerMixin":
        new = type(self.scheduler).from_config(self.scheduler.config)
        set_timesteps(new, self.num_inference_steps, self.timesteps)
        return new

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Noise level of every call."""
        scheduler, timesteps = self.begin()
        return levels_of(scheduler, timesteps, self.start)

    @cached_property
    def end(self) -> tuple[float, float]:
        """Signal and noise of ``x_N``: ``x_N = α x0 + σ ε``."""
        return end_of(self.begin()[0])

    @property
    def calls(self) -> int:
        return len(self.levels)

    def call_of(self, step: int) -> int:
        """The call with which a solver step begins: PNDM's first step takes two."""
        return step + (self.calls - (self.num_inference_steps - self.start) if step > self.start else 0) - self.start

    @property
    def takes_noise(self) -> bool:
        """Whether calls inject fresh noise."""
        return self.eta > 0 or type(self.scheduler).__name__ in NOISY

    @cached_property
    def noise_level(self) -> float:
        """Standard deviation of the latents at the start, in the solver's own scaling."""
        if self.start == 0:
            return float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return 1 / self.levels[0].scale

    def from_step(self, start: int) -> "Route":
        """The same solver begun at ``start``, without the noise that eta adds."""
        return replace(self, start=start, eta=0.0)


def _step(solver: Any, e: Tensor, t: Tensor, x: Tensor, eta: float, noise: Tensor | None) -> Tensor:
    takes = _step_takes(solver.__class__)
    extra = {"eta": eta} if "eta" in takes else {}
    if noise is None:
        stepped: Tensor = solver.step(e, t, x, **extra).prev_sample
        return stepped
    if "variance_noise" in takes:
        return solver.step(e, t, x, **extra, variance_noise=noise).prev_sample
    # these draw it themselves, from a generator that knows nothing of samples and calls
    module: Any = sys.modules[type(solver).__module__]
    drawn = module.randn_tensor
    module.randn_tensor = lambda *shape, **options: noise
    try:
        return solver.step(e, t, x, **extra).prev_sample
    finally:
        module.randn_tensor = drawn


@cache
def _step_takes(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.step).parameters)


def walk(
    route: Route,
    x: Tensor,
    call_network: CallNetwork,
    *,
    injected: Tensor | None = None,
    endpoint: Tensor | None = None,
    until: int | None = None,
    last: int | None = None,
) -> Tensor:
    """From latent ``x [B, …]`` to the final one; ``call_network`` is asked for ``e_i`` at every call, in order.

    Args:
        injected: standard normal noise ``[calls, B, …]``; needed where the route takes noise.
        endpoint: per sample ``[B]`` the call whose x0-prediction is the result; the number of calls means ``x_N``.
            The walk ends with the last call anybody needs.
        until: stop before this call and return the latent there.
        last: end later, with this call, for others who walk in step. The result depends on all calls until there, by
            nothing where it needs none of them, so that their backward passes are in step too.
    """
    if route.takes_noise and injected is None:
        raise ValueError(f"{type(route.scheduler).__name__} injects noise at its calls: give it")
    solver, timesteps = route.begin()
    dtype, calls = x.dtype, len(timesteps)
    last = calls if endpoint is None else int(endpoint.max()) if last is None else last
    # copied once, without waiting for what the device was asked before; solvers read the CPU's
    there = timesteps.to(x.device, non_blocking=True)
    ends = None if endpoint is None else endpoint.to(x.device, non_blocking=True)
    result = None
    for i, t in enumerate(timesteps[:until]):
        scaled = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        e = call_network(i, scaled, there[i].expand(x.shape[0]))
        if endpoint is not None and ends is not None and (i == last or bool((endpoint == i).any())):
            level = route.levels[i]
            predicted = level.x0_of_x * x + level.x0_of_e * e
            here = (ends == i).view(-1, *[1] * (x.dim() - 1))
            result = predicted if result is None else torch.where(here, predicted, result)
            if i == last:
                return result
        # some schedulers compute in float32 whatever they are given
        noise = injected[i] if route.takes_noise and injected is not None else None
        x = _step(solver, e, t, x, route.eta, noise).to(dtype)
    if result is None or ends is None:
        return x
    return torch.where((ends == calls).view(-1, *[1] * (x.dim() - 1)), x, result)
