"""A pipeline as one ``.safetensors`` in the names of the original code, as A1111, ComfyUI and trainers read it.

SD 1.x and 2.x: CompVis' and Stability's; SDXL: generative-models'; SD 3: sd3-ref's, its text encoders under
``text_encoders.``. diffusers' ``from_single_file`` reads every one back.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.models.kohya import sgm_name
from sdo_cli.models.lora_files import published
from sdo_cli.models.mmdit_names import original

State = dict[str, Tensor]

# OpenCLIP's names in place of transformers'
_OPEN_CLIP = (
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# norms of queries and keys, which no adapter has
_MMDIT_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}


def checkpoint_of(pipeline: Any, family: str) -> State:
    """Every tensor of the file, by its original name.

    Args:
        family: ``sd``, ``sdxl`` or ``sd3``.
    """
    denoiser = mmdit(pipeline.transformer) if family == "sd3" else unet(pipeline.unet)
    parts = {"model.diffusion_model.": denoiser, "first_stage_model.": vae(pipeline.vae), **_texts(pipeline, family)}
    found = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def unet(net: Any) -> State:
    return {f"{_unet_name(net, module)}.{kind}": tensor for module, kind, tensor in _tensors(net)}


def _unet_name(net: Any, module: str) -> str:
    if module == "conv_norm_out":
        return "out.0"
    name = sgm_name(module, net.config.layers_per_block)
    if (found := re.match(r"up_blocks\.(\d+)\.upsamplers", module)) and not hasattr(
        net.up_blocks[int(found[1])], "attentions"
    ):
        # there is no attention before it
        return name.replace(".2.", ".1.", 1)
    return name


def vae(net: Any) -> State:
    blocks = len(net.config.block_out_channels)
    found = {}
    for module, kind, tensor in _tensors(net):
        name = _vae_name(module, blocks)
        # attention is made of convolutions of one pixel there
        as_convolution = ".attn_1." in name and tensor.dim() == 2
        found[f"{name}.{kind}"] = tensor[:, :, None, None] if as_convolution else tensor
    return found


def _vae_name(module: str, blocks: int) -> str:
    if (mid := re.fullmatch(r"(\w+)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)", module)) is not None:
        rest = _VAE_ATTENTION[mid[4]] if mid[2] == "attentions" else mid[4]
        place = "attn_1" if mid[2] == "attentions" else f"block_{int(mid[3]) + 1}"
        return f"{mid[1]}.mid.{place}.{rest}".replace("conv_shortcut", "nin_shortcut")
    side = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if side is None:
        return module.replace("conv_norm_out", "norm_out")
    way, number = side[2], int(side[3])
    stem = f"{side[1]}.{way}.{number if way == 'down' else blocks - 1 - number}"
    if side[4] == "resnets":
        return f"{stem}.block.{side[5]}.{side[6]}".replace("conv_shortcut", "nin_shortcut")
    return f"{stem}.{side[4].removesuffix('rs')[:-1]}e.{side[6]}"


def mmdit(net: Any) -> State:
    last, found = net.config.num_layers - 1, State()
    packed: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for module, kind, tensor in _tensors(net):
        norm = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if norm is not None and norm[2] in _MMDIT_NORMS:
            found[f"joint_blocks.{norm[1]}.{_MMDIT_NORMS[norm[2]]}.{kind}"] = tensor
            continue
        there = original(module, last_block=last)
        if there is None:
            found["pos_embed" if kind == "pos_embed" else f"{module}.{kind}"] = tensor
        elif there.third is not None:
            packed[f"{there.name}.{kind}"][there.third] = tensor
        else:
            found[f"{there.name}.{kind}"] = torch.cat(tensor.chunk(2)[::-1]) if there.swapped else tensor
    return found | {name: torch.cat([parts[place] for place in range(3)]) for name, parts in packed.items()}


def _texts(pipeline: Any, family: str) -> dict[str, State]:
    """By the beginning of their names."""
    if family == "sd3":
        clip = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
        found = {f"text_encoders.{name}.transformer.": _clip(part) for name, part in clip.items() if part is not None}
        # CLIP-L's projection is in none of these files
        for key in [key for key in found.get("text_encoders.clip_l.transformer.", {}) if "text_projection" in key]:
            del found["text_encoders.clip_l.transformer."][key]
        if pipeline.text_encoder_3 is not None:
            # its embedding goes by two names, and a file holds it once
            words = pipeline.text_encoder_3.state_dict()
            found["text_encoders.t5xxl.transformer."] = {k: v for k, v in words.items() if "embed_tokens" not in k}
        return found
    if family == "sdxl":
        return {
            "conditioner.embedders.0.transformer.": _clip(pipeline.text_encoder),
            "conditioner.embedders.1.model.": open_clip(pipeline.text_encoder_2),
        }
    if pipeline.text_encoder.config.hidden_act == "gelu":
        # SD 2.x: OpenCLIP's
        return {"cond_stage_model.model.": open_clip(pipeline.text_encoder)}
    return {"cond_stage_model.transformer.": _clip(pipeline.text_encoder)}


def _clip(encoder: nn.Module) -> State:
    return {published("text_encoder", name): tensor for name, tensor in encoder.state_dict().items()}


def open_clip(encoder: nn.Module) -> State:
    """One matrix for queries, keys and values, and the projection the other way round."""
    found, packed = State(), defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in _clip(encoder).items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
            continue
        part = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part is not None:
            packed[f"transformer.resblocks.{part[1]}.attn.in_proj_{part[3]}"][part[2]] = tensor
            continue
        for theirs, ours in _OPEN_CLIP:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in packed.items()}


def _tensors(net: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Module, ``weight`` or ``bias``, and the tensor."""
    for name, tensor in net.state_dict().items():
        module, _, kind = name.rpartition(".")
        yield module, kind, tensor
