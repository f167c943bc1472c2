"""A LoRA file in diffusers' layout, read into layers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdo_cli.errors import EnvironmentFault

NAME = "pytorch_lora_weights.safetensors"
# ways in use to name the two halves of a layer: diffusers', transformers', peft's
DOWN = (".lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight")
UP = (".lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Layer:
    """``W + (alpha / rank) up @ down``.

    Attributes:
        down, up: ``[rank, in]`` and ``[out, rank]`` (convolutions have two more dimensions).
        alpha: as kohya means it, so that the factor is alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """Attributes:
    layers: by component (``unet``, ``transformer``, ``text_encoder``, …) and module name.
    configs: peft's settings by component; empty for a file without metadata, whose alpha then is its rank.
    """

    layers: dict[str, dict[str, Layer]]
    configs: dict[str, dict[str, Any]]


def lora_path(source: Path) -> Path:
    """The file itself, or the one in a run folder.

    Raises:
        EnvironmentFault: there is none.
    """
    path = source / NAME if source.is_dir() else source
    if not path.is_file():
        what = f"{source} holds no {NAME}" if source.is_dir() else f"no LoRA at {source}"
        raise EnvironmentFault(what, remedy="give the folder of a finished run, or a LoRA file")
    return path


def read_lora(source: Path) -> LoraFile:
    """Read a LoRA in diffusers' layout.

    Raises:
        EnvironmentFault: no such file, no safetensors, or another layout.
    """
    from safetensors import SafetensorError, safe_open

    path = lora_path(source)
    try:
        with safe_open(path, "pt") as stream:
            described = json.loads((stream.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise EnvironmentFault(f"{path} is no safetensors file", remedy="give a LoRA of sdo or diffusers") from fault
    configs: dict[str, dict[str, Any]] = {}
    for key, value in described.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    layers: dict[str, dict[str, Layer]] = {}
    for key in tensors:
        if (suffix := next((s for s in DOWN if key.endswith(s)), None)) is None:
            continue
        component, _, module = key.removesuffix(suffix).partition(".")
        up = tensors[key.removesuffix(suffix) + UP[DOWN.index(suffix)]]
        alpha = alpha_of(configs.get(component, {}), module, rank=tensors[key].shape[0])
        layers.setdefault(component, {})[module] = Layer(tensors[key], up, alpha)
    if not layers:
        hint = "it has kohya's names already" if any(key.startswith("lora_") for key in tensors) else "it is no LoRA"
        raise EnvironmentFault(f"{path} is not in diffusers' layout: {hint}", remedy="give a file that diffusers wrote")
    return LoraFile(layers, configs)


def alpha_of(config: dict[str, Any], module: str, *, rank: int) -> float:
    """kohya's alpha of a layer: peft's own, or its pattern's, or the rank where nothing is said."""
    alpha = float(config.get("lora_alpha") or rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
    # rank-stabilised LoRA divides by the square root of the rank
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
