"""Where a result came from: versions, machine, command, time."""

import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

from sdo_cli.threads import cores

PACKAGES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "omegaconf", "sdo-diffusion")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str]:
    """Of the packages a result depends on, and of Python."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # sdo itself, run from a checkout
        return "not installed"


_instead: list[list[str]] = []


def command() -> str:
    """As it was typed, but for the path of `sdo`; of a call from Python, what comes nearest to it."""
    return shlex.join(["sdo", *(_instead[-1] if _instead else sys.argv[1:])])


@contextmanager
def instead(words: Sequence[str]) -> Iterator[None]:
    """The command line that stands for a call from Python."""
    _instead.append(list(words))
    try:
        yield
    finally:
        _instead.pop()


def machine() -> dict[str, str]:
    """What computed it; nothing that names a person or a host."""
    import torch

    found = {"system": f"{platform.system()} {platform.machine()}", "processors": str(cores())}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    return found | {"threads": str(torch.get_num_threads())}
