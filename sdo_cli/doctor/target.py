"""The device a recipe is to fit on."""

import os
import re
from dataclasses import dataclass

from sdo_cli.errors import RecipeFault

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
    """

    name: str
    memory: int
    on_cpu: bool
    context: int
    slack: float

    def needed(self, peak: int) -> int:
        """Bytes of the device for a peak of tensors."""
        return self.context + round(peak * (1 + self.slack))


def gpu(name: str, memory: int) -> Target:
    """A CUDA GPU."""
    return Target(name, memory, on_cpu=False, context=700_000_000, slack=0.1)


def find_target(gpu_memory: str | None) -> Target:
    """The GPU the user names by its memory, else the one of this machine, else its CPU.

    Raises:
        RecipeFault: ``gpu_memory`` is no size.
    """
    import torch

    if gpu_memory is not None:
        return gpu(f"a GPU of {gpu_memory}", parse_size(gpu_memory))
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return gpu(found.name, found.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target("this machine's CPU", memory, on_cpu=True, context=900_000_000, slack=0.1)


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
