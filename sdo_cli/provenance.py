"""Where a result came from: versions, machine, command, time."""

import platform
import shlex
import sys
import time
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


def command() -> str:
    """As it was typed, but for the path of `sdo`."""
    return shlex.join(["sdo", *sys.argv[1:]])


def machine() -> dict[str, str]:
    """What computed it; nothing that names a person or a host."""
    import torch

    found = {"system": f"{platform.system()} {platform.machine()}", "processors": str(cores())}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    return found | {"threads": str(torch.get_num_threads())}
