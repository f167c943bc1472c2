"""What a model family is to the rest of sdo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdo_cli.sampling.guidance import Condition


class Family(Protocol):
    """A text-to-image model: prompts in, native network outputs and images out.

    Attributes:
        name: ``sd``, ``sdxl`` or ``sd3``.
        source: where it was loaded from.
        pipeline: the diffusers pipeline its parts come from.
        denoiser: the ``nn.Module`` that is trained or carries the adapter.
        vae: decodes latents; its weights are never trained.
        scheduler_config: the model's own, of any diffusers class.
        notes: what is to be said of the model before it is used, a sentence each.
        second_loras: adapters that some calls alone have, by file and scale (:mod:`sdo_cli.models.second_lora`).
        lora_targets, text_lora_targets: module names that carry adapters by default.
        pipeline_class: the diffusers pipeline that loads the same folder.
    """

    name: str
    source: str
    pipeline: Any
    denoiser: Any
    vae: Any
    scheduler_config: Mapping[str, Any]
    notes: tuple[str, ...]
    second_loras: dict[tuple[str, float], str]
    lora_targets: tuple[str, ...]
    text_lora_targets: tuple[str, ...]
    pipeline_class: str

    @property
    def device(self) -> torch.device: ...

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        ...

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Those that may carry adapters, by diffusers' component name; empty once freed."""
        ...

    def adapted(self, adapter: str) -> dict[str, nn.Module]:
        """The parts that carry this adapter, by diffusers' component name."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype, *, train_all: bool = False) -> None:
        """Move every part and compute in ``dtype``; adapters stay in fp32, and so does the denoiser with
        ``train_all`` (it then computes under autocast)."""
        ...

    def text_to(self, device: torch.device) -> None:
        """Move the text encoders only: prompts can be encoded before anything else takes memory."""
        ...

    def free_text_encoders(self) -> None:
        """Drop them; prompts can no longer be encoded."""
        ...

    def train_text_encoders(self) -> None:
        """From now on conditions name prompts, and :meth:`network` encodes them (with gradients where enabled)."""
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """``(C, h, w)`` for an image size in pixels, the model's own size by default."""
        ...

    def encode(self, prompts: list[str]) -> Condition:
        """Everything the network needs beside latent and time, ``[B, …]`` each; no gradient."""
        ...

    def encode_negative(self, prompt: str) -> Condition:
        """The unconditional side of guidance, ``[1, …]`` each; no gradient."""
        ...

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Native output (ε, v or velocity) for latents ``[B, C, h, w]`` and a timestep per sample ``[B]``."""
        ...

    def base_network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Like :meth:`network`, with the adapters switched off; no gradient."""
        ...

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance is an input of the network, as LCM's (arXiv 2310.04378), instead of a second call."""
        ...

    def with_guidance(self, condition: Condition, scale: float) -> Condition:
        """The condition with a guidance scale in it, for a network that takes one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, RGB in [0, 1], with gradients; the one place where the range is decided."""
        ...

    def to_latents(self, images: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` that :meth:`decode` turns back into ``images``, nearly; no gradient."""
        ...

    def skippable(self, grain: str) -> dict[str, nn.Module]:
        """The denoiser's units that a skip plan may leave out, by module name: whole ``blocks``, or their residual and
        attention ``parts``."""
        ...

    @property
    def architecture(self) -> str:
        """Fingerprint of the denoiser's config: models with the same one take each other's skip plans."""
        ...

    def lay_out_channels_last(self) -> None:
        """Convolutions' weights, and with them what passes through, in the layout tensor cores work in."""
        ...

    def tile_vae(self) -> None:
        """Decode in overlapping tiles of at most 512 pixels, which costs memory of one."""
        ...

    def checkpoint_vae(self) -> None:
        """Recompute the decoder's blocks (with tiling: each tile) in its backward pass."""
        ...

    def use_scheduler_config(self, config: Mapping[str, Any]) -> None:
        """Put another config in place of the model's own."""
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Write everything as a diffusers pipeline folder."""
        ...

    def load_lora(self, path: str, *, adapter: str = "lora", scale: float | None = None) -> None:
        """Put a LoRA file (diffusers' or kohya's names) or run folder in."""
        ...

    def check_lora(self, path: str) -> None:
        """Whether it could be: raises EnvironmentFault for what :meth:`load_lora` would not take."""
        ...

    def save_lora(self, folder: Path, adapter: str = "default") -> None:
        """Write ``pytorch_lora_weights.safetensors`` as diffusers' ``load_lora_weights`` reads it."""
        ...
