"""DeepSpeed's ZeRO, as accelerate's own configuration describes it: what of it is carried out here.

`accelerate launch` hands its ``deepspeed_config`` to the processes as ``ACCELERATE_DEEPSPEED_*`` variables or as the
name of DeepSpeed's JSON file, and accelerate's plugin reads them. Training builds the engine (``optimizers/zero.py``);
accelerate would run the backward pass.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdo_cli.errors import EnvironmentFault, first_line
from sdo_cli.installed import install_extra

SWITCH = "ACCELERATE_USE_DEEPSPEED"
# sums gradients and lets the caller say where accumulation ends, in both stages; no older one was tried
NEEDED = (0, 19, 8)
# of zero_optimization: handed on to DeepSpeed
CARRIED = ("reduce_bucket_size", "allgather_bucket_size", "reduce_scatter", "contiguous_gradients")
# held against the recipe, or built from it
FROM_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
)
# hints and other stages' settings: results are the same without
IGNORED = ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
ZERO_IGNORED = ("stage", "overlap_comm", "allgather_partitions", "sub_group_size", "ignore_unused_parameters")
WHY = {
    "fp16": "set fp16.enabled to auto or false, and mixed_precision=bf16 or no in the recipe",
    "bf16": "set bf16.enabled to auto or false: mixed_precision=bf16 in the recipe computes in it, weights stay fp32",
    "scheduler": "take it out: lr_scheduler and lr_warmup_steps of the recipe say the rate",
    "zero_optimization.offload_optimizer": "set its device to none; FSDP (fsdp_version: 2) cuts the weights up too",
    "zero_optimization.offload_param": "set its device to none; FSDP (fsdp_version: 2) cuts the weights up instead",
    "zero_optimization.round_robin_gradients": "set it to false: DeepSpeed finds the parts of a weight by their order",
    "activation_checkpointing": "take it out, and gradient_checkpointing=true in the recipe",
}


@dataclass(frozen=True)
class Zero:
    """What the configuration says.

    Attributes:
        stage: 1 deals out AdamW's state, 2 gradients too.
        said: DeepSpeed's configuration, ``auto`` where the recipe decides.
    """

    stage: int
    said: dict[str, Any]

    def described(self, processes: int) -> str:
        """What is dealt out."""
        what = "AdamW's state and the gradients" if self.stage == 2 else "AdamW's state"
        return f"DeepSpeed ZeRO {self.stage}: each process keeps 1/{processes} of {what}"

    @property
    def carried(self) -> dict[str, Any]:
        """What is handed on to DeepSpeed as it is."""
        zero = self.said["zero_optimization"]
        return {key: zero[key] for key in CARRIED if zero.get(key, "auto") != "auto"}


def zero_asked_for() -> Zero | None:
    """How accelerate's configuration wants DeepSpeed, None if it does not.

    Raises:
        EnvironmentFault: DeepSpeed is missing or too old, or the configuration asks for what cannot be done here.
    """
    if os.environ.get(SWITCH, "").lower() not in ("true", "1", "yes"):
        return None
    _check_installed()
    said = _read()
    stage = said["zero_optimization"].get("stage", 0)
    if stage not in (1, 2):
        what, remedy = _stage(stage)
        raise EnvironmentFault(what, remedy=remedy)
    for name, remedy in refused(said):
        raise EnvironmentFault(f"DeepSpeed's configuration has {name}, which sdo cannot do", remedy=remedy)
    # the engine is ours: accelerate then sees processes like any others
    os.environ[SWITCH] = "false"
    return Zero(stage, said)


def _stage(stage: Any) -> tuple[str, str]:
    what = f"accelerate's configuration asks for DeepSpeed's ZeRO stage {stage}; sdo does stages 1 and 2"
    if stage == 3:
        return what, "choose FSDP in `accelerate config` (fsdp_version: 2), which cuts up the same; or zero_stage: 2"
    return what, "zero_stage: 1 or 2 under deepspeed_config; with 0 there is nothing to deal out: start with --gpus N"


def _check_installed() -> None:
    needed = ".".join(map(str, NEEDED))
    try:
        there = version("deepspeed")
    except PackageNotFoundError as fault:
        raise EnvironmentFault(
            "accelerate's configuration asks for DeepSpeed, which is not installed", remedy=install_extra("deepspeed")
        ) from fault
    numbers = tuple(int(part) for part in there.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < NEEDED:
        raise EnvironmentFault(f"deepspeed {there} is too old, sdo needs {needed}", remedy=install_extra("deepspeed"))


def _read() -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin

    try:
        said: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    # a file that is not there or no JSON; settings in two places
    except (ValueError, KeyError, TypeError, OSError) as fault:
        raise EnvironmentFault(
            f"accelerate's configuration of DeepSpeed: {first_line(fault)}",
            remedy="a deepspeed_config_file stands alone, without even mixed_precision; see docs/clusters.md",
        ) from fault
    return said


def refused(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and remedy of everything that is switched on and neither carried out nor without effect on results."""
    inner = {f"zero_optimization.{key}": value for key, value in said["zero_optimization"].items()}
    known = {*FROM_RECIPE, *IGNORED, *(f"zero_optimization.{key}" for key in (*CARRIED, *ZERO_IGNORED))}
    for name, value in {**said, **inner}.items():
        # settings of stage 3 mean nothing in the others
        if name in known or name == "zero_optimization" or name.startswith("zero_optimization.stage3_") or _off(value):
            continue
        yield name, WHY.get(name, "take it out")


def _off(value: Any) -> bool:
    """Not asked for: off, empty, left to others, or a section that is."""
    if isinstance(value, dict):
        if "enabled" in value:
            return _off(value["enabled"])
        return _off(value["device"]) if "device" in value else not value
    return value in (None, False, 0, "", "none", "auto", "false")
