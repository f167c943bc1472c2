"""Known repositories of models and LoRAs: licence, and about how much there is to download. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from sdo_cli import embedded
from sdo_cli.hub import WeightFile


@dataclass(frozen=True)
class KnownModel:
    """Attributes:
    size: bytes of the files sdo needs, about, as published when this was written; not looked up.
    licence: of the weights.
    gated: whether the licence has to be accepted on the hub first.
    config: the folder of ``sdo_cli/models/configs`` with the same architecture.
    """

    size: int
    licence: str
    gated: bool = False
    config: str | None = None


RAIL, STABILITY = "CreativeML Open RAIL++-M", "Stability AI Community"
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": KnownModel(4_300_000_000, "CreativeML Open RAIL-M", config="sd15"),
    "stabilityai/stable-diffusion-2-1": KnownModel(5_200_000_000, RAIL, config="sd21"),
    "stabilityai/stable-diffusion-2-1-base": KnownModel(5_200_000_000, RAIL, config="sd21-base"),
    "stabilityai/stable-diffusion-xl-base-1.0": KnownModel(13_900_000_000, RAIL, config="sdxl"),
    "stabilityai/sdxl-turbo": KnownModel(
        13_900_000_000, "Stability AI Non-Commercial Research Community", config="sdxl"
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": KnownModel(
        15_500_000_000, STABILITY, gated=True, config="sd3-medium"
    ),
    "stabilityai/stable-diffusion-3.5-medium": KnownModel(16_000_000_000, STABILITY, gated=True, config="sd35-medium"),
    "stabilityai/stable-diffusion-3.5-large": KnownModel(27_000_000_000, STABILITY, gated=True, config="sd35-large"),
    "madebyollin/sdxl-vae-fp16-fix": KnownModel(335_000_000, "MIT"),
    "madebyollin/taesd": KnownModel(9_800_000, "MIT"),
    "madebyollin/taesdxl": KnownModel(9_800_000, "MIT"),
    "madebyollin/taesd3": KnownModel(9_900_000, "MIT"),
}
# small decoders by their short names
TINY = {"taesd": "madebyollin/taesd", "taesdxl": "madebyollin/taesdxl", "taesd3": "madebyollin/taesd3"}

# by repository and file, as :func:`hub_lora` reads them
LORAS = {
    "latent-consistency/lcm-lora-sdv1-5": KnownModel(135_000_000, RAIL),
    "latent-consistency/lcm-lora-sdxl": KnownModel(394_000_000, RAIL),
}
# what diffusers calls the file of a LoRA
LORA_FILE = "pytorch_lora_weights.safetensors"


def tiny_source(name: str) -> str:
    """Folder or hub id of a small decoder."""
    if embedded.is_embedded(name):
        return str(embedded.folder(name, default="tiny"))
    return TINY.get(name, name)


def hub_lora(name: str) -> WeightFile | None:
    """The file that ``owner/repository`` or ``owner/repository/file.safetensors`` stands for; None for a path."""
    path, (owner, _, rest) = Path(name), name.partition("/")
    if name.startswith((".", "/", "~")) or not owner or not rest or Path(owner).exists() or path.expanduser().exists():
        return None
    repository, _, file = rest.partition("/")
    if not all(re.fullmatch(r"[\w.-]+", part) for part in (owner, repository)):
        return None
    if bool(file) != (path.suffix == ".safetensors"):
        return None
    known = LORAS.get(name)
    size, licence = (known.size, known.licence) if known else (0, "")
    return WeightFile(f"{owner}/{repository}", file or LORA_FILE, size, licence)
