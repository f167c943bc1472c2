"""AdamW dealt out by DeepSpeed's ZeRO: every process keeps and steps a part of the state, all keep whole weights.

    stage 1   backward passes add into ``.grad`` as always; the step sums them over the processes, each gets its part
    stage 2   every backward pass sums and deals out what it found: ``.grad`` is empty after it

Passes go through ``engine.backward`` in stage 2, steps through ``engine.step`` in both; DeepSpeed is told to sum
gradients, not to average them, and that the step says where accumulation ends (``managed_gradient_accumulation``).
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.optimizers.adamw import KERNELS
from sdo_cli.parallel.world import World
from sdo_cli.recipe.schema import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


class Held(nn.Module):
    """The model as DeepSpeed sees it: its hooks on calls stand here, where nobody calls; weights are what it needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@dataclass(frozen=True)
class Part:
    """A parameter's moment, of which this process has a part; for a checkpoint, put together one at a time."""

    parameter: nn.Parameter
    name: str

    def detach(self) -> "Part":
        return self

    def full_tensor(self) -> Tensor:
        """In the parameter's shape; all processes call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        full: Tensor = safe_get_full_optimizer_state(self.parameter, self.name)
        return full


class ZeroAdamW:
    """Takes the place of AdamW, clipping and the look for numbers that are not finite.

    Args:
        adamw: over ``parameters``; DeepSpeed puts its own part of all of them, flat, in their place. A schedule of the
            rate goes on working on it.

    Raises:
        EnvironmentFault: DeepSpeed's configuration and the recipe say different things.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        *,
        model: nn.Module,
        parameters: list[nn.Parameter],
        adamw: torch.optim.Optimizer,
    ) -> None:
        self.parameters, self.adamw, self.world = parameters, adamw, world
        with _quiet():
            if parameters[0].device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed

            self.engine, *_ = deepspeed.initialize(
                model=Held(model), model_parameters=parameters, optimizer=adamw, config=settings(recipe, world)
            )
        assert world.zero is not None
        self._in_passes, self._passes = world.zero.stage == 2, 0

    def backward(self, total: Tensor) -> None:
        """Gradients of ``total`` into this step's; in stage 2 all processes call it equally often."""
        if self._in_passes:
            if not self._passes:
                # one may be writing a checkpoint: here all wait as long as it takes, in DeepSpeed's group ten minutes
                self.world.wait()
            self._passes += 1
            self.engine.backward(total, scale_wrt_gas=False)
        else:
            total.backward()

    def step(self) -> float:
        """Sum, clip, step, clear.

        Returns:
            The norm before clipping, inf if it is not finite: then nothing is changed. 0 without any gradient.
        """
        found = self._passes if self._in_passes else sum(p.grad is not None for p in self.parameters)
        self._passes = 0
        if not self.world.largest(found):
            return 0.0
        missing = [] if self._in_passes else [parameter for parameter in self.parameters if parameter.grad is None]
        if missing:
            # all send the same ones: what is missing here counts as zero where another process has it
            _zero(missing).backward()
        with _quiet():
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def drop(self) -> None:
        """Forget this step's gradients, and change nothing; all processes call it."""
        if not self._in_passes:
            for parameter in self.parameters:
                parameter.grad = None
            return
        if self._passes:
            # parts of them lie inside DeepSpeed, which forgets them where one is not finite
            self.backward(self.parameters[0].sum() * float("nan"))
            self.step()

    def state_dict(self) -> dict[str, Any]:
        """As of an AdamW over whole parameters, its moments as :class:`Part`."""
        flat = self.adamw.state_dict()
        group = {**flat["param_groups"][0], "params": list(range(len(self.parameters)))}
        found: dict[int, dict[str, Any]] = {}
        for mine in flat["state"].values():
            for index, parameter in enumerate(self.parameters):
                found[index] = {"step": mine["step"], **{name: Part(parameter, name) for name in MOMENTS}}
        return {"state": found, "param_groups": [group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of an AdamW over whole parameters, every process with its part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if state["state"]:
            self._make_moments()
        for index, of_one in state["state"].items():
            parameter = self.parameters[index]
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, of_one[name].to(parameter.device), name)
        for mine in self.adamw.state.values():
            mine["step"].copy_(max(of_one["step"] for of_one in state["state"].values()))
        (group,) = self.adamw.param_groups
        ours = ("params", *KERNELS)
        group.update({key: value for key, value in state["param_groups"][0].items() if key not in ours})

    def take_weights(self) -> None:
        """The parameters were given other values: steps go on from these."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in self.parameters:
            safe_set_full_fp32_param(parameter, parameter.data)

    def _make_moments(self) -> None:
        """AdamW makes them in its first step: one that changes nothing."""
        for group in self.adamw.param_groups:
            group["lr"] = 0.0
        self.backward(_zero(self.parameters))
        self.step()


def _zero(parameters: list[nn.Parameter]) -> Tensor:
    """Whose backward pass gives them gradients of zero; a pass, because DeepSpeed makes its buffers in one."""
    return torch.stack([0.0 * parameter.sum() for parameter in parameters]).sum()


def settings(recipe: Recipe, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration for this recipe.

    Raises:
        EnvironmentFault: what accelerate's says differs from the recipe, all of it in one sentence.
    """
    assert world.zero is not None
    micro, passes = recipe.train_batch_size, recipe.gradient_accumulation_steps
    sizes = {
        "train_batch_size": micro * passes * world.size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": recipe.max_grad_norm,
    }
    if found := conflicts(world.zero.said, recipe, sizes):
        raise EnvironmentFault(
            f"DeepSpeed's configuration and the recipe differ: {'; '.join(found)}",
            remedy="write auto in DeepSpeed's: then the recipe decides",
        )
    return {
        **sizes,
        "zero_optimization": {
            "stage": world.zero.stage,
            "overlap_comm": False,
            # elements; its own default would take 2 GB
            "reduce_bucket_size": 2**26,
            **world.zero.carried,
        },
        "gradient_allreduce_op": "sum",
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31,
    }


def conflicts(said: dict[str, Any], recipe: Recipe, sizes: dict[str, Any]) -> list[str]:
    """Where both say something and not the same, ``key: there, here``."""
    wanted: dict[str, Any] = {
        **sizes,
        "optimizer.type": "AdamW",
        "optimizer.params.lr": recipe.learning_rate,
        "optimizer.params.betas": [recipe.adam_beta1, recipe.adam_beta2],
        "optimizer.params.eps": recipe.adam_epsilon,
        "optimizer.params.weight_decay": recipe.adam_weight_decay,
        # which code computes it is no matter
        "optimizer.params.torch_adam": ...,
        "optimizer.params.adam_w_mode": True,
    }
    there = {key: said[key] for key in sizes if key in said}
    optimizer = said.get("optimizer") or {}
    there |= {f"optimizer.{key}": value for key, value in optimizer.items() if key != "params"}
    there |= {f"optimizer.params.{key}": value for key, value in (optimizer.get("params") or {}).items()}
    # accelerate's launcher says 1 when nobody chose
    if there.get("gradient_accumulation_steps") == 1:
        del there["gradient_accumulation_steps"]
    return [
        f"{key}: {value} there, {wanted.get(key, 'unknown')} here"
        for key, value in there.items()
        if value != "auto" and wanted.get(key) is not ... and not _same(value, wanted.get(key))
    ]


def _same(there: Any, here: Any) -> bool:
    return bool(str(there).lower() == str(here).lower() or there == here)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed builds, prints and warns when it is imported and stepped; --json owns the standard output."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
