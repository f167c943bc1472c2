"""What turns gradients into steps: AdamW, the rate, the loss scaler of fp16, the running mean of the weights."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault, TrainingFault
from sdo_cli.recipe.schema import Recipe

# fp16 gradients that overflow are skipped while the scaler finds its scale; this many in a row are a fault
MOST_SKIPPED = 20
FIRST_SCALE = 2.0**12


def make_adamw(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, its state in fp32 or in 8 bits.

    Raises:
        EnvironmentFault: ``adamw8bit`` without bitsandbytes.
    """
    return _adamw_class(recipe.optimizer)(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.adam_weight_decay,
    )


def _adamw_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    try:
        return import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as fault:
        raise EnvironmentFault(
            "optimizer adamw8bit needs the package bitsandbytes",
            remedy="pip install 'sdo-cli[8bit]', or set optimizer=adamw",
        ) from fault


@dataclass(frozen=True)
class Step:
    """Attributes:
    norm: of the gradient before clipping.
    rate: learning rate used.
    skipped: True when an fp16 gradient overflowed and nothing was changed.
    """

    norm: float
    rate: float
    skipped: bool


class Stepper:
    """Clips, unscales, steps; keeps the running mean (diffusers' EMAModel) when the recipe wants one."""

    def __init__(self, recipe: Recipe, parameters: list[nn.Parameter]) -> None:
        from diffusers.optimization import get_scheduler

        self.recipe, self.parameters = recipe, parameters
        self.optimizer = make_adamw(recipe, parameters)
        self.rate = get_scheduler(
            "constant_with_warmup" if recipe.lr_scheduler == "constant" else recipe.lr_scheduler,
            self.optimizer,
            num_warmup_steps=recipe.lr_warmup_steps,
            num_training_steps=recipe.max_train_steps,
        )
        self.scaler = None
        if recipe.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(parameters[0].device.type, init_scale=FIRST_SCALE)
        self.ema: Any = None
        if recipe.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(parameters, decay=recipe.ema_decay)
        self._skipped = 0

    @property
    def scale(self) -> float:
        """What the loss is multiplied with before it is sent back."""
        if self.scaler is None:
            return 1.0
        return self.scaler.scale(torch.ones((), device=self.parameters[0].device)).item()

    def step(self, number: int) -> Step:
        """One optimizer step on the accumulated gradients, which are cleared.

        Raises:
            TrainingFault: the gradient is not finite.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        skipped = self._refuse_non_finite(number, norm)
        rate = self.rate.get_last_lr()[0]
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if not skipped:
            self.rate.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(float(norm), rate, skipped)

    def _refuse_non_finite(self, number: int, norm: Tensor) -> bool:
        """Whether the scaler will skip this step; without one, or too often, it is a fault."""
        if bool(torch.isfinite(norm)):
            self._skipped = 0
            return False
        self._skipped += 1
        if self.scaler is None:
            text = f"step {number}: the gradient is not finite"
            raise TrainingFault(text, remedy="lower learning_rate, or set mixed_precision=no")
        if self._skipped >= MOST_SKIPPED:
            text = f"step {number}: the gradient overflowed fp16 {MOST_SKIPPED} times in a row"
            raise TrainingFault(text, remedy="set mixed_precision=bf16 or no")
        return True

    def state(self) -> dict[str, Any]:
        """Everything a later step depends on, the trained weights included."""
        found = {
            "parameters": [parameter.data for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "skipped": self._skipped,
        }
        if self.scaler is not None:
            found["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            found["ema"] = self.ema.state_dict()
        # functions of the schedule; the recipe makes them again
        found["rate"] = {key: value for key, value in found["rate"].items() if key != "lr_lambdas"}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            ValueError: other parameters.
        """
        kept = state["parameters"]
        shapes = [tuple(p.shape) for p in self.parameters]
        if [tuple(tensor.shape) for tensor in kept] != shapes:
            raise ValueError(f"it holds {len(kept)} trained tensors, this run has {len(shapes)}, or of other shapes")
        for parameter, tensor in zip(self.parameters, kept, strict=True):
            parameter.data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict({**self.rate.state_dict(), **state["rate"]})
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.parameters[0].device)
        self._skipped = state["skipped"]

    def finish(self) -> None:
        """What is kept is the running mean, if there is one."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
