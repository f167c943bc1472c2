"""Learned multistep solvers as diffusers schedulers; see :mod:`sdo_cli.sampling.multistep`.

Importing this module imports diffusers.
"""

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.multistep import Levels, clock_of
from sdo_cli.skipping.multistep import Multistep, multistep_of


class _Multistep:
    """What both have. ``sigmas`` hold the levels that the network is asked at; the grid stands beside them."""

    _slopes: tuple[Tensor, ...] = ()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None, sigmas: Any = None
    ) -> None:
        """As the stock scheduler's, with timesteps of one's own, one per call of the learned solver."""
        given = {"timesteps": timesteps, "sigmas": sigmas}
        super().set_timesteps(  # type: ignore[misc]
            num_inference_steps, device=device, **{name: list(value) for name, value in given.items() if value}
        )
        here: Any = self
        self._numbers: Multistep = multistep_of(here.config.multistep)
        self._grid = here.sigmas.double().tolist()
        if self._numbers.calls != len(self._grid) - 1:
            raise SolverFault(
                f"the solver was learned for {self._numbers.calls} calls, not {len(self._grid) - 1}",
                remedy=f"draw with {self._numbers.calls} steps",
            )
        self._clock, asked = clock_of(self._grid, self._numbers.weights, self._numbers.scales)
        self._asked, self._levels, self._slopes = asked, self.levels, ()
        # two calls may ask at one level, and the first is the first
        here.set_begin_index(0)
        here.timesteps = self._levels.timestep(torch.tensor(asked, dtype=torch.float64)).float()
        here.sigmas = torch.tensor([*asked, self._grid[-1]], dtype=torch.float32)

    @property
    def grid(self) -> list[float]:
        """``t_0 … t_K``."""
        return self._grid

    @property
    def levels(self) -> Levels:
        raise NotImplementedError

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """As diffusers' schedulers: ``prev_sample`` and ``pred_original_sample``, or the first alone in a tuple."""
        here: Any = self
        if here.step_index is None:
            self._slopes = ()
            here._init_step_index(timestep)
        i = here.step_index
        # where σ/α is 4096, float32 loses the image; half precision always would
        wide = torch.promote_types(sample.dtype, torch.float32)
        x, e = sample.to(wide), model_output.to(wide)
        image = self._levels.image(x, e, self._asked[i])
        row = self._numbers.weights[i]
        self._slopes = ((x - image) / self._clock[i], *self._slopes)[: len(self._numbers.weights[-1])]
        if missing := row[len(self._slopes) :]:
            # a walk begun in the middle knows less: its newest slope stands for those before
            row = (row[0] + sum(missing), *row[1 : len(self._slopes)])
        ahead = torch.stack([w * slope for w, slope in zip(row, self._slopes, strict=False)]).sum(0)
        found = (x + (self._grid[i + 1] - self._clock[i]) * ahead).to(model_output.dtype)
        here._step_index += 1
        return EulerDiscreteSchedulerOutput(found, image) if return_dict else (found, image)


class LearnedMultistepScheduler(_Multistep, EulerDiscreteScheduler):
    """Of ε-, v- and x0-networks, in latents ``x0 + σ ε``."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        multistep: Any = None,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            prediction_type=prediction_type,
            final_sigmas_type=final_sigmas_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    @property
    def levels(self) -> Levels:
        signal = self.alphas_cumprod.double()
        return Levels(self.config.prediction_type, ((1 - signal) / signal).sqrt().log(), len(signal))

    @property
    def init_noise_sigma(self) -> float:
        """Of the grid's first level, where latents have variance σ² + 1, as DDIM's begin with variance 1."""
        first: float = self._grid[0] if hasattr(self, "_grid") else float(self.sigmas.max())
        return (first**2 + 1) ** 0.5


class LearnedFlowMatchScheduler(_Multistep, FlowMatchEulerDiscreteScheduler):
    """Of flow-matching networks."""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, multistep: Any = None) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=1.0)

    @property
    def levels(self) -> Levels:
        return Levels("flow_prediction", torch.empty(0), self.config.num_train_timesteps)
