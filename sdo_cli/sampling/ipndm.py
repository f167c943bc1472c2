"""iPNDM on a Stable Diffusion model's own noise levels. diffusers' class of that name has levels of its own.

Importing this module imports diffusers.
"""

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from sdo_cli.sampling.multistep import SLOPES


class IPNDMSigmaScheduler(EulerDiscreteScheduler):
    """Euler's steps along slopes ``(x - x0) / σ`` extrapolated from up to four calls; orders one to three first.

    The coefficients are those of even steps, as the authors use them whatever the spacing is.
    """

    # no constructor of its own: diffusers reads a scheduler's settings off it
    _slopes: tuple[Tensor, ...] = ()

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """As diffusers' schedulers: ``prev_sample`` and ``pred_original_sample``, or the first alone in a tuple."""
        if self.step_index is None:
            self._slopes = ()
            self._init_step_index(timestep)
        # where σ/α is 4096, float32 loses the image; half precision always would
        wide = torch.promote_types(sample.dtype, torch.float32)
        x, e = sample.to(wide), model_output.to(wide)
        here, there = (float(sigma) for sigma in self.sigmas[self.step_index : self.step_index + 2])
        image = self._image(x, e, here)
        self._slopes = ((x - image) / here, *self._slopes)[: len(SLOPES)]
        # an extrapolated slope would miss the image: the last step goes to the prediction, as Euler's does
        weights = SLOPES[len(self._slopes) - 1 if there else 0]
        ahead = torch.stack([w * slope for w, slope in zip(weights, self._slopes, strict=False)]).sum(0)
        found = EulerDiscreteSchedulerOutput((x + (there - here) * ahead).to(model_output.dtype), image)
        self._step_index += 1
        return found if return_dict else (found.prev_sample, found.pred_original_sample)

    def _image(self, x: Tensor, e: Tensor, sigma: float) -> Tensor:
        """The prediction of x0."""
        if self.config.prediction_type == "v_prediction":
            return x / (sigma**2 + 1) - e * sigma / (sigma**2 + 1) ** 0.5
        return e if self.config.prediction_type == "sample" else x - sigma * e
