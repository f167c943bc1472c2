"""Reads weight files made by others: whatever is wrong with one becomes one sentence."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdo_cli.errors import EnvironmentFault

# what torch, safetensors and the libraries above them raise on a file that is damaged or something else
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError)


def reason(fault: BaseException) -> str:
    """The first line of an error, or plain words where that line speaks of the library's inside."""
    if isinstance(fault, UnpicklingError | EOFError | SafetensorError):
        return "it is damaged or holds something else than weights"
    return (str(fault).splitlines() or [type(fault).__name__])[0]


def read_state(path: Path, what: str, again: str = "copy or download it again") -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a ``.safetensors`` or torch file; there also one level down, in ``state_dict``.

    Args:
        what: the file in words, for the sentence when it is wrong.
        again: what to do about one that cannot be read.

    Raises:
        EnvironmentFault: not there, not readable, or without tensors.
    """
    if not path.is_file():
        raise EnvironmentFault(f"no {what} at {path}", remedy="check the option, or leave it out")
    try:
        is_safe = path.suffix == ".safetensors"
        read = load_file(path) if is_safe else torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as fault:
        raise EnvironmentFault(f"cannot read the {what} {path}: {reason(fault)}", remedy=again) from fault
    state = read.get("state_dict", read) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise EnvironmentFault(f"the {what} {path} is no table of weights", remedy="give the file as it was published")
    return state
