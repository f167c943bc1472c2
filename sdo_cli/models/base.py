"""What a model family is to the rest of sdo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdo_cli.sampling.guidance import Condition


class Family(Protocol):
    """A text-to-image model: prompts in, native network outputs and images out.

    Attributes:
        name: ``sd``, later ``sdxl``, ``sd3``.
        source: where it was loaded from.
        denoiser: the ``nn.Module`` adapters are put into (with diffusers' ``add_adapter``).
        scheduler_config: the model's own, of any diffusers class.
        lora_targets: module names that carry adapters by default.
        pipeline_class: the diffusers pipeline that loads the same folder.
    """

    name: str
    source: str
    denoiser: Any
    scheduler_config: Mapping[str, Any]
    lora_targets: tuple[str, ...]
    pipeline_class: str

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move every part; adapters stay in fp32."""
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """``(C, h, w)`` for an image size in pixels, the model's own size by default."""
        ...

    def encode(self, prompts: list[str]) -> Condition:
        """Everything the network needs beside latent and time, ``[B, …]`` each; no gradient."""
        ...

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Native output (ε, v or velocity) for latents ``[B, C, h, w]`` and a timestep per sample ``[B]``."""
        ...

    def base_network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Like :meth:`network`, with the adapter switched off; no gradient."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, RGB in [0, 1], with gradients; the one place where the range is decided."""
        ...

    def load_lora(self, path: str, scale: float) -> None:
        """Put a LoRA file or run folder in, at ``scale``."""
        ...

    def save_lora(self, folder: Path, adapter: str = "default") -> None:
        """Write ``pytorch_lora_weights.safetensors`` as diffusers' ``load_lora_weights`` reads it."""
        ...
