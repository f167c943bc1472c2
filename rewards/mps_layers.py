"""MPS's layers after CLIP: picture tokens look at prompt tokens, then at each other (PaLM's parallel blocks).

B pictures, T picture tokens, L prompt tokens, D width, h heads of 64. Keys and values are shared by all heads (Shazeer
2019, arXiv 1911.02150), feed-forward layers stand beside the attention and are gated by SiLU (arXiv 2002.05202),
positions are rotations (arXiv 2104.09864).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD = 64


def _bare(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _heads(x: Tensor) -> Tensor:
    """``[B, T, h · 64]`` to ``[B, h, T, 64]``."""
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[B, T, h · 64]`` of queries ``[B, h, T, 64]`` and keys and values ``[B, L, 64]`` that all heads share."""
    likeness = (q * HEAD**-0.5) @ k.unsqueeze(1).mT
    if bias is not None:
        likeness = likeness + bias[:, None, None]
    return (likeness.softmax(-1) @ v.unsqueeze(1)).transpose(1, 2).flatten(2)


class Gate(nn.Module):
    """``SiLU(second half) · first half``; without weights, so that layers are numbered as in the file."""

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * kept


class Rotations(nn.Module):
    """Angles ``[T, 64]`` of the positions; ``inv_freq`` stands in the file."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, HEAD, 2).float() / HEAD)))

    def forward(self, x: Tensor) -> Tensor:
        """Turns ``[…, T, 64]``."""
        places = torch.arange(x.shape[-2], device=x.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(places, self.inv_freq).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)


class Looking(nn.Module):
    """Picture tokens look at prompt tokens, with a feed-forward layer beside it."""

    def __init__(self, width: int, heads: int, wider: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_kv = _bare(width, heads * HEAD), _bare(width, 2 * HEAD)
        self.to_out = _bare(heads * HEAD, width)
        self.ff = nn.Sequential(_bare(width, 2 * wider), Gate(), _bare(wider, width))

    def forward(self, x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        normed = self.norm(x)
        k, v = self.to_kv(words).chunk(2, dim=-1)
        looked: Tensor = self.to_out(_attend(_heads(self.to_q(normed)), k, v, bias))
        return x + looked + self.ff(normed)


class Within(nn.Module):
    """Picture tokens look at each other, with a feed-forward layer beside it; one product makes all inputs."""

    def __init__(self, width: int, heads: int, wider: int) -> None:
        super().__init__()
        self.norm, self.rotary_emb = nn.LayerNorm(width), Rotations()
        self.sizes = (heads * HEAD, HEAD, HEAD, 2 * wider)
        self.fused_attn_ff_proj, self.attn_out = _bare(width, sum(self.sizes)), _bare(heads * HEAD, width)
        self.ff_out = nn.Sequential(Gate(), _bare(wider, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        looked: Tensor = self.attn_out(_attend(self.rotary_emb(_heads(q)), self.rotary_emb(k), v))
        return x + looked + self.ff_out(wide)


class CrossModel(nn.Module):
    """Pairs of both. ``recompute``: in the backward pass, instead of keeping what is between."""

    def __init__(self, width: int, layers: int, heads: int, wider: int) -> None:
        super().__init__()
        self.recompute = False
        # each stands in a residual connection called fn in the file
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"fn": kind(width, heads, wider)}) for kind in (Looking, Within))
            for _ in range(layers)
        )

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> "CrossModel":
        """With the weights of a file; sizes are read off them.

        Raises:
            KeyError, RuntimeError: they are another model's.
        """
        inner, width = state["layers.0.0.fn.to_q.weight"].shape
        wider = state["layers.0.0.fn.ff.2.weight"].shape[1]
        model = cls(width, len({name.split(".")[1] for name in state}), inner // HEAD, wider)
        model.load_state_dict(state)
        return model

    def forward(self, x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        """Args:
        x: picture tokens ``[B, T, D]``.
        words: prompt tokens ``[B, L, D]``.
        bias: 0 or -inf ``[B, L]``: which of them are looked at.
        """
        pairs: Any = self.layers
        for looking, within in pairs:
            x = self._run(looking["fn"], x, words, bias)
            x = self._run(within["fn"], x)
        return x

    def _run(self, layer: Any, *given: Tensor) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *given, use_reentrant=False)
        return layer(*given)
