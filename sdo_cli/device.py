"""Which device a job runs on, and in which precision."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# accelerate's names of mixed precision
PRECISIONS = ("no", "fp16", "bf16")


def pick_device() -> "torch.device":
    """The GPU if there is one, else the CPU; of several processes each has its own, set when it joined them."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")


def described() -> str:
    """What computes, and by how many threads of the CPU, for people."""
    import torch

    threads = torch.get_num_threads()
    name = "the CPU" if pick_device().type == "cpu" else torch.cuda.get_device_name()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def dtype_of(precision: str) -> "torch.dtype":
    """``no``, ``fp16`` or ``bf16`` to the type of floating-point numbers."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
