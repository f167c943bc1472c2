"""Which device a job runs on, and the allocator it needs there."""

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def pick_device() -> "torch.device":
    """The GPU if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed tensors back to the kernel.

    Every activation would otherwise be mapped, zeroed and unmapped again: half of the time of a training step on
    the CPU was measured to be page faults (docs/log.md). True when it took hold;
    elsewhere than on glibc it cannot.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))
    return all(mallopt(option, value) == 1 for option, value in wanted)
