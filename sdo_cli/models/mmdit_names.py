"""Layers of diffusers' SD 3 transformer under their names in Stability's code, as sd-scripts has them.

Queries, keys and values are one layer there; in the last blocks scale and shift stand the other way round.
"""

import re
from dataclasses import dataclass

_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_INSIDE = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_PACKED = {f"attn.to_{part}": ("x_block.attn.qkv", place) for place, part in enumerate("qkv")}
_PACKED |= {f"attn.add_{part}_proj": ("context_block.attn.qkv", place) for place, part in enumerate("qkv")}
_PACKED |= {f"attn2.to_{part}": ("x_block.attn2.qkv", place) for place, part in enumerate("qkv")}


@dataclass(frozen=True)
class Original:
    """Attributes:
    name: in the original code.
    third: which of the three parts of its outputs, None for all of it.
    swapped: both halves of its outputs stand the other way round.
    """

    name: str
    third: int | None = None
    swapped: bool = False


def original(module: str, *, last_block: int) -> Original | None:
    """The place of a module of ``SD3Transformer2DModel``; None when it has none.

    Args:
        last_block: its number, whose text side only normalises.
    """
    if module in _OUTSIDE:
        return Original(_OUTSIDE[module], swapped=module == "norm_out.linear")
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if found is None:
        return None
    stem, rest = f"joint_blocks.{found[1]}", found[2]
    if rest in _PACKED:
        name, third = _PACKED[rest]
        return Original(f"{stem}.{name}", third)
    if rest not in _INSIDE:
        return None
    return Original(f"{stem}.{_INSIDE[rest]}", swapped=rest == "norm1_context.linear" and int(found[1]) == last_block)
