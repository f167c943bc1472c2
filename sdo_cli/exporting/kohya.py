"""kohya's names (sd-scripts, networks/lora.py), which A1111 and ComfyUI read.

diffusers' own ``convert_state_dict_to_kohya`` writes alpha = rank whatever alpha was, and SDXL's prefix for the text
encoder of SD 1.x; so the names are made here, and read back through diffusers in the tests.
"""

import re
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.exporting.lora_file import LoraFile

PREFIXES = {
    "sd": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
BASE = {"sdxl": "sdxl_base_v1-0"}


def to_sgm(module: str, layers_per_block: int = 2) -> str:
    """A module of diffusers' UNet under the name of SDXL's original code, as sd-scripts names SDXL's layers.

    Raises:
        EnvironmentFault: a layer outside the attention blocks.
    """
    each = layers_per_block + 1
    if found := re.match(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", module):
        return f"input_blocks.{each * int(found[1]) + int(found[2]) + 1}.1.{found[3]}"
    if found := re.match(r"mid_block\.attentions\.0\.(.*)", module):
        return f"middle_block.1.{found[1]}"
    if found := re.match(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", module):
        return f"output_blocks.{each * int(found[1]) + int(found[2])}.1.{found[3]}"
    raise EnvironmentFault(
        f"no kohya name for the layer {module}: sdo writes those of the attention blocks",
        remedy="use --format peft, or train without lora.target_modules of your own",
    )


def kohya_state(lora: LoraFile, family: str, *, layers_per_block: int = 2) -> dict[str, Tensor]:
    """Every layer as ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha`` (a scalar).

    Raises:
        EnvironmentFault: a family or layer that has no such names.
    """
    if family not in PREFIXES:
        raise EnvironmentFault(
            f"there are no kohya names for {family} models that other programs read",
            remedy="ComfyUI and diffusers read the run's pytorch_lora_weights.safetensors as it is",
        )
    state = {}
    for component, layers in lora.layers.items():
        for module, layer in layers.items():
            name = to_sgm(module, layers_per_block) if (family, component) == ("sdxl", "unet") else module
            key = f"{PREFIXES[family][component]}_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = layer.down
            state[f"{key}.lora_up.weight"] = layer.up
            state[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return state


def kohya_metadata(lora: LoraFile, family: str, model: str) -> dict[str, str]:
    """What sd-scripts notes in the file and A1111 shows."""
    ranks = {layer.rank for layers in lora.layers.values() for layer in layers.values()}
    alphas = {layer.alpha for layers in lora.layers.values() for layer in layers.values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": BASE.get(family) or sd_version(lora),
        "ss_sd_model_name": model,
    }


def sd_version(lora: LoraFile) -> str:
    """``sd_v1`` or ``sd_v2``, by the width of the text embeddings the cross attention reads."""
    return "sd_v2" if text_width(lora) == 1024 else "sd_v1"


def text_width(lora: LoraFile) -> int | None:
    """Features the UNet's cross attention reads: 768 (SD 1.x), 1024 (2.x), 2048 (SDXL)."""
    for module, layer in lora.layers.get("unet", {}).items():
        if module.endswith(("attn2.to_k", "attn2.to_v")):
            return layer.down.shape[1]
    return None


def guess_family(lora: LoraFile) -> str | None:
    """The family a file was made for, None when it does not show."""
    if "transformer" in lora.layers:
        return "sd3"
    if "text_encoder_2" in lora.layers:
        return "sdxl"
    widths: dict[Any, str] = {768: "sd", 1024: "sd", 2048: "sdxl"}
    return widths.get(text_width(lora))
