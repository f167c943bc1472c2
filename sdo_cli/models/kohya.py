"""Names of LoRA layers as kohya's sd-scripts writes them, which A1111 and ComfyUI read.

SD 1.x and 2.x keep diffusers' module names; SDXL's UNet has those of the original code (sd-scripts,
library/sdxl_model_util.py). sd-scripts has no names for SD 3's separate projections, so SD 3 gets OneTrainer's, which
ComfyUI reads (comfy/lora.py, ``lora_transformer_``) and which this package reads back; plain diffusers does not.

diffusers' own ``convert_state_dict_to_kohya`` writes alpha = rank whatever alpha was, and SDXL's prefix for the text
encoder of SD 1.x.
"""

import re
from collections.abc import Mapping

# the first prefix is written, all are read
PREFIXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd": {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
    "sdxl": {"unet": ("lora_unet",), "text_encoder": ("lora_te1", "lora_te"), "text_encoder_2": ("lora_te2",)},
    "sd3": {"transformer": ("lora_transformer",), "text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te2",)},
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_name(module: str, layers_per_block: int = 2) -> str:
    """A module of diffusers' SDXL UNet under its name in the original code.

    Raises:
        KeyError: no such place in that UNet.
    """
    if (found := _BLOCK.fullmatch(module)) is None:
        return _OUTSIDE[module]
    side, part, rest = found[1], found[3], found[5]
    block, index, each = int(found[2] or 0), int(found[4]), layers_per_block + 1
    if part == "resnets":
        rest = _RESNET[rest]
    if side == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{each * (block + 1)}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{each * block + layers_per_block}.2.{rest}"
    stem = "input_blocks" if side == "down" else "output_blocks"
    return f"{stem}.{each * block + index + (side == 'down')}.{int(part == 'attentions')}.{rest}"


def kohya_names(component: str, module: str, *, family: str, layers_per_block: int = 2) -> tuple[str, ...]:
    """Every name a layer goes by, without ``.lora_down.weight``; the first is the one to write.

    Args:
        component: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``.
        module: as in published diffusers LoRA files: text encoders with ``text_model.``.
        layers_per_block: of the UNet, 2 in every published model.

    Raises:
        KeyError: the family, component or module has no such name.
    """
    modules = [module]
    if (family, component) == ("sdxl", "unet"):
        # some trainers keep diffusers' names for SDXL too, which every program reads
        modules.insert(0, sgm_name(module, layers_per_block))
    return tuple(f"{prefix}_{name}".replace(".", "_") for name in modules for prefix in PREFIXES[family][component])
