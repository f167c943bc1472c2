"""The device a recipe is to fit on."""

import os
import re
from dataclasses import dataclass, replace

from sdo_cli.device import pick_device
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.gpus import find_gpu
from sdo_cli.estimate.measuring import measure_speed
from sdo_cli.estimate.speed import Speed
from sdo_cli.recipe.schema import Recipe

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Target:
    """Attributes:
    name: for people.
    memory: bytes.
    on_cpu: runs on the CPU, in the machine's own memory.
    context: bytes taken before the first tensor: CUDA's context and libraries (a guess: no GPU was at hand), or
        Python with its libraries (0.84 GB measured).
    slack: share of the tensors' peak for the allocator's fragments and the scratch of kernels. On a CPU a full-size
        step's resident memory was 6 to 11 % above the tensors' (tests/test_estimate.py); a guess for GPUs.
    speed: None where nobody has said which device it is, or measured it.
    """

    name: str
    memory: int
    on_cpu: bool
    context: int
    slack: float
    speed: Speed | None = None

    @property
    def half(self) -> str:
        """The half precision it multiplies in."""
        return "bf16" if self.speed is None or "bf16" in self.speed.products else "fp16"

    def needed(self, peak: int) -> int:
        """Bytes of the device for a peak of tensors."""
        return self.context + round(peak * (1 + self.slack))


def gpu(name: str, memory: int, speed: Speed | None = None) -> Target:
    """A CUDA GPU."""
    return Target(name, memory, on_cpu=False, context=700_000_000, slack=0.1, speed=speed)


def find_target(gpu_memory: str | None, name: str | None = None) -> Target:
    """The GPU the user names, or gives the memory of, else the one of this machine, else its CPU.

    Raises:
        RecipeFault: ``gpu_memory`` is no size, ``name`` no GPU sdo knows.
    """
    import torch

    if name is not None:
        named = find_gpu(name)
        memory = round(named.memory * 1e9) if gpu_memory is None else parse_size(gpu_memory)
        return gpu(named.name, memory, named.speed)
    if gpu_memory is not None:
        return gpu(f"a GPU of {gpu_memory}", parse_size(gpu_memory))
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return gpu(found.name, found.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target("this machine's CPU", memory, on_cpu=True, context=900_000_000, slack=0.1)


def measured(target: Target, recipe: Recipe) -> Target:
    """This machine's device with its speed, in the precisions of a recipe."""
    # norms and adapters are in fp32 whatever the recipe asks for
    precisions = dict.fromkeys(("no", recipe.mixed_precision, recipe.reward_precision))
    return replace(target, speed=measure_speed(pick_device(), precisions))


def parse_size(text: str) -> int:
    """``12GB``, ``24 GiB``, ``8000MB`` to bytes; a bare number is gigabytes.

    Raises:
        RecipeFault: none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)?b?)\s*", text, re.IGNORECASE)
    size = float(match[1]) * UNITS[(match[2] or "g").lower()] if match else 0.0
    if size < 1e6:
        raise RecipeFault([f"--gpu-memory {text}: is no size of memory; write for example 12GB"], what="command line")
    return int(size)
