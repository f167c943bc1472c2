"""Every random draw of a run, keyed by (run seed, purpose, step, sample index) and made on the CPU.

So draws do not depend on batch size, world size or where a run was resumed.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key_to_seed(run_seed: int, purpose: str, step: int = 0, sample: int = 0) -> int:
    """32 well-mixed bits; torch's CPU generator uses only the low 32 bits of a seed."""
    text = f"{run_seed}/{purpose}/{step}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def keyed_generator(run_seed: int, purpose: str, step: int = 0, sample: int = 0) -> "torch.Generator":
    import torch

    return torch.Generator("cpu").manual_seed(key_to_seed(run_seed, purpose, step, sample))
