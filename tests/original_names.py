"""Small pipelines as one file with the original names of every family, the other way than diffusers reads them."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def resnet(name: str) -> str:
    table = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    table |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    return re.sub(r"^(\w+)", lambda found: table[found[1]], name)


def original_unet(name: str, each: int, attended: list[bool]) -> str:
    """diffusers' name of a UNet layer in CompVis' code.

    Args:
        each: layers to a block, without the one that changes the size.
        attended: whether each block on the way up has attention.
    """
    heads = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0"}
    heads |= {"time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
    heads |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    for old, new in heads.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{found[3] if found[1] == 'attentions' else resnet(found[3])}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    way, block, what, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if what == "downsamplers":
        return f"input_blocks.{(each + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        return f"output_blocks.{(each + 1) * block + each}.{1 + attended[block]}.{rest}"
    number = (each + 1) * block + layer + (way == "down")
    side = "input_blocks" if way == "down" else "output_blocks"
    return f"{side}.{number}.{1 if what == 'attentions' else 0}.{rest if what == 'attentions' else resnet(rest)}"


def original_vae(name: str, blocks: int) -> str:
    name = re.sub(r"(encoder)\.down_blocks\.(\d)\.", r"\1.down.\2.", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
    for old, new in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
    name = (
        name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    )
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def clip_layers(encoder):
    """Names as published, with the level that newer transformers leave out."""
    for name, value in encoder.state_dict().items():
        is_inner = not name.startswith(("text_model.", "text_projection."))
        yield (f"text_model.{name}" if is_inner else name), value


def open_clip(encoder) -> dict[str, torch.Tensor]:
    """In OpenCLIP's names: one matrix for query, key and value, the projection the other way round."""
    found, packed = {}, {}
    for name, value in clip_layers(encoder):
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif hit := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            packed.setdefault((hit[1], hit[3]), {})[hit[2]] = value
        else:
            for old, new in {
                "embeddings.token_embedding": "token_embedding",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm": "ln_final",
                "encoder.layers": "transformer.resblocks",
                "self_attn": "attn",
                "layer_norm": "ln_",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }.items():
                name = name.replace(old, new)
            found[name] = value
    for (layer, kind), parts in packed.items():
        found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([parts[part] for part in "qkv"])
    return found


def halves_swapped(value: torch.Tensor) -> torch.Tensor:
    """Scale and shift stand the other way round in the original."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


MMDIT_HEADS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
MMDIT_LAYERS = {
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
PACKED = {
    "attn.to_{}": ("x_block.attn.qkv", "qkv"),
    "attn.add_{}_proj": ("context_block.attn.qkv", "qkv"),
    "attn2.to_{}": ("x_block.attn2.qkv", "qkv"),
}


def mmdit(net) -> dict[str, torch.Tensor]:
    """SD 3's transformer in the names of its authors."""
    state, found = net.state_dict(), {}
    last = f"transformer_blocks.{net.config.num_layers - 1}."
    for name, value in state.items():
        if name.startswith("norm_out.") or name.startswith(f"{last}norm1_context."):
            value = halves_swapped(value)
        if head := next((old for old in MMDIT_HEADS if name.startswith(old)), None):
            found[MMDIT_HEADS[head] + name.removeprefix(head)] = value
            continue
        _, block, rest = name.split(".", 2)
        place = f"joint_blocks.{block}."
        if layer := next((old for old in MMDIT_LAYERS if rest.startswith(old)), None):
            found[place + MMDIT_LAYERS[layer] + rest.removeprefix(layer)] = value
    for block in range(net.config.num_layers):
        for pattern, (new, letters) in PACKED.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.{pattern.format(letter)}.{kind}" for letter in letters]
                if names[0] in state:
                    found[f"joint_blocks.{block}.{new}.{kind}"] = torch.cat([state[name] for name in names])
    return found


def vae(net) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in net.state_dict().items():
        new = original_vae(name, len(net.config.block_out_channels))
        # the original's attention is made of 1x1 convolutions
        is_linear = ".attn_1." in new and ".norm." not in new and new.endswith("weight")
        found[new] = value[:, :, None, None] if is_linear else value
    return found


def text_encoders(pipe) -> dict[str, dict[str, torch.Tensor]]:
    """By prefix in the file."""
    kind = type(pipe).__name__
    if kind == "StableDiffusion3Pipeline":
        places = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2}
        return {
            f"text_encoders.{name}.transformer.": {
                # CLIP-L's projection is not in these files
                key: value
                for key, value in clip_layers(part)
                if name == "clip_g" or not key.startswith("text_projection")
            }
            for name, part in places.items()
        }
    if kind == "StableDiffusionXLPipeline":
        return {
            "conditioner.embedders.0.transformer.": dict(clip_layers(pipe.text_encoder)),
            "conditioner.embedders.1.model.": open_clip(pipe.text_encoder_2),
        }
    if pipe.text_encoder.config.hidden_act == "gelu":
        return {"cond_stage_model.model.": open_clip(pipe.text_encoder)}
    return {"cond_stage_model.transformer.": dict(clip_layers(pipe.text_encoder))}


def write_original(pipe, path: Path) -> None:
    """A pipeline as one file with the names of the original code."""
    if hasattr(pipe, "unet"):
        each = pipe.unet.config.layers_per_block
        attended = [hasattr(block, "attentions") for block in pipe.unet.up_blocks]
        denoiser = {original_unet(name, each, attended): value for name, value in pipe.unet.state_dict().items()}
    else:
        denoiser = mmdit(pipe.transformer)
    parts = {"model.diffusion_model.": denoiser, "first_stage_model.": vae(pipe.vae), **text_encoders(pipe)}
    save_file({prefix + name: v.contiguous() for prefix, part in parts.items() for name, v in part.items()}, path)
