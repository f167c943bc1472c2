"""Gradients into steps: the optimizer, the rate, the loss scaler of fp16, the running mean of the weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sdo_cli.errors import TrainingFault
from sdo_cli.optimizers.adamw import KERNELS, make_adamw
from sdo_cli.parallel.adding import AddedElsewhere, Adding
from sdo_cli.parallel.shards import as_laid_out, in_shards, whole
from sdo_cli.parallel.world import World
from sdo_cli.recipe.schema import Recipe

FIRST_SCALE = 2.0**12


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


@dataclass(frozen=True)
class Step:
    """Attributes:
    norm: of the gradient before clipping.
    rate: learning rate used.
    skipped: True when a reward or the gradient was not finite and nothing was changed.
    """

    norm: float
    rate: float
    skipped: bool


class Dealt(Protocol):
    """What steps in the optimizer's place; adds up over the processes, clips, and looks for numbers not finite."""

    def backward(self, total: Tensor) -> None: ...

    def step(self) -> float: ...

    def drop(self) -> None: ...

    def take_weights(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stepper:
    """Clips, unscales, steps; keeps the running mean (diffusers' EMAModel) when the recipe wants one.

    Args:
        replaced: called when parameters were given other values than a step gives them.
        deal: makes of ``parameters`` and ``adamw`` what steps in its place.
        adamw_only: those of ``parameters`` that this then leaves to AdamW; None: all of them, in parts.
    """

    def __init__(
        self,
        recipe: Recipe,
        parameters: list[nn.Parameter],
        replaced: Callable[[], None] | None = None,
        *,
        deal: Callable[..., Dealt] | None = None,
        adamw_only: list[nn.Parameter] | None = None,
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.recipe, self.parameters, self._replaced = recipe, parameters, replaced
        # parts of tensors are left to kernels that every torch has for them
        in_parts = any(map(in_shards, parameters)) or (deal is not None and adamw_only is None)
        self.optimizer = make_adamw(recipe, parameters if adamw_only is None else adamw_only, fused=not in_parts)
        # schedulefree trains at another point than it is drawn with
        self._two_points = recipe.optimizer == "schedulefree"
        self._train()
        self.dealt = None if deal is None else deal(parameters=parameters, adamw=self.optimizer)
        self.rate = get_scheduler(
            "constant_with_warmup" if recipe.lr_scheduler == "constant" else recipe.lr_scheduler,
            self.optimizer,
            num_warmup_steps=recipe.lr_warmup_steps,
            num_training_steps=recipe.max_train_steps,
        )
        if warmup := recipe.lr_warmup_steps:
            # diffusers' begins at 0: a step that computes everything and changes nothing
            after = self.rate.lr_lambdas[0]
            self.rate = LambdaLR(
                self.optimizer, lambda step: (step + 1) / warmup if step < warmup else float(after(step))
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

    @property
    def backward(self) -> Callable[[Tensor], None]:
        """What every backward pass has to be done by."""
        return Tensor.backward if self.dealt is None else self.dealt.backward

    def adding(self, world: World, parameters: Sequence[nn.Parameter]) -> Adding | AddedElsewhere:
        """What adds up every process's gradients before the step; ``parameters`` in the order of calls."""
        return world.adding(parameters) if self.dealt is None else AddedElsewhere()

    def step(self, number: int, bad_reward: str | None = None) -> Step:
        """One optimizer step on the accumulated gradients, which are cleared; none where they are not finite.

        Args:
            bad_reward: the reward that was not finite, if one was: its gradient means nothing.

        Raises:
            TrainingFault: too many steps in a row were skipped.
        """
        rate = self.rate.get_last_lr()[0]
        if bad_reward is not None:
            self._drop()
            self._count(number, f"the reward {bad_reward} is not a finite number")
            return Step(float("nan"), rate, True)
        norm = self._apply() if self.dealt is None else self.dealt.step()
        if not math.isfinite(norm):
            self._count(number, "the gradient is not finite" + " in fp16" * (self.scaler is not None))
            return Step(norm, rate, True)
        self._skipped = 0
        self.rate.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return Step(norm, rate, False)

    def _apply(self) -> float:
        """Unscale, clip, step where all is finite, clear; the norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)))
        if self.scaler is not None:
            # it looks itself, and finds a smaller scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif math.isfinite(norm):
            self.optimizer.step()
        self._drop()
        return norm

    def _drop(self) -> None:
        if self.dealt is not None:
            self.dealt.drop()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def _count(self, number: int, what: str) -> None:
        self._skipped += 1
        if self._skipped >= self.recipe.max_skipped_steps:
            times = f" for the {_ordinal(self._skipped)} time in a row" if self._skipped > 1 else ""
            precision = "set mixed_precision=bf16 or no" if self.scaler is not None else "lower learning_rate"
            raise TrainingFault(
                f"step {number}: {what}{times}",
                remedy=f"{precision}; look at the last pictures under samples/: the model may have collapsed",
            )

    def state(self) -> dict[str, Any]:
        """Everything a later step depends on, the trained weights included; in shards where they are."""
        found = {
            "parameters": [parameter.data for parameter in self.parameters],
            "optimizer": (self.dealt or self.optimizer).state_dict(),
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
        """Go on from what :meth:`state` gave, put together if it was in shards.

        Raises:
            ValueError: other parameters.
        """
        kept = state["parameters"]
        shapes = [tuple(p.shape) for p in self.parameters]
        if [tuple(tensor.shape) for tensor in kept] != shapes:
            raise ValueError(f"it holds {len(kept)} trained tensors, this run has {len(shapes)}, or of other shapes")
        (self.dealt or self.optimizer).load_state_dict(self._with_own_kernel(self._laid_out(state["optimizer"])))
        self._lay_out_moments()
        # after the optimizer: DeepSpeed makes a step to have moments
        self._put(kept)
        if self.dealt is not None:
            self.dealt.take_weights()
        self.rate.load_state_dict({**self.rate.state_dict(), **state["rate"]})
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and "ema" in state:
            means = [as_laid_out(m, p) for m, p in zip(state["ema"]["shadow_params"], self.parameters, strict=True)]
            self.ema.load_state_dict({**state["ema"], "shadow_params": means})
            self.ema.to(self.parameters[0].device)
        self._skipped = state["skipped"]

    def _laid_out(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's, with what belongs to a parameter's elements in shards where the parameter is."""

        def as_parameter(value: Any, parameter: nn.Parameter) -> Any:
            fits = isinstance(value, Tensor) and value.shape == parameter.shape
            return as_laid_out(value, parameter) if fits else value

        found = {
            index: {name: as_parameter(value, self.parameters[index]) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": found}

    def _with_own_kernel(self, state: dict[str, Any]) -> dict[str, Any]:
        """Which kernel steps is this optimizer's affair, not the one's that wrote the state."""
        own = {key: self.optimizer.defaults[key] for key in KERNELS if key in self.optimizer.defaults}
        return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}

    def _lay_out_moments(self) -> None:
        """Files hold them row by row; one kernel for all of them goes through memory in the parameter's order."""
        for parameter, of_one in self.optimizer.state.items():
            for name, value in of_one.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    of_one[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(as_laid_out(value, parameter))
        if self._replaced is not None:
            self._replaced()

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """The weights that would be kept if training ended now: the running mean, where there is one."""
        if self.ema is None and not self._two_points:
            yield
            return
        now = [parameter.detach().clone() for parameter in self.parameters]
        self.finish()
        try:
            yield
        finally:
            self._train()
            # there and back is not the same bits
            self._put(now)

    def _train(self) -> None:
        if self._two_points:
            self.optimizer.train()  # type: ignore[attr-defined]

    def finish(self) -> None:
        """What is kept is the running mean, where there is one: ours or schedulefree's own."""
        if self._two_points:
            self.optimizer.eval()  # type: ignore[attr-defined]
        if self.ema is not None:
            self._put(self.ema.shadow_params)
