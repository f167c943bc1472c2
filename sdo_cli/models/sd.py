"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet, KL autoencoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.sampling.guidance import Condition


class StableDiffusion:
    """The ``sd`` family (see :class:`sdo_cli.models.base.Family`).

    Args:
        pipeline: a loaded diffusers ``StableDiffusionPipeline``; its parts are used, and its LoRA loader.
    """

    name = "sd"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    pipeline_class = "StableDiffusionPipeline"

    def __init__(self, pipeline: Any, source: str) -> None:
        self.source, self._pipeline = source, pipeline
        self.denoiser: Any = pipeline.unet
        self.vae, self.text_encoder, self.tokenizer = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        for part in (self.denoiser, self.vae, self.text_encoder):
            part.eval().requires_grad_(False)
        self._dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        for part in (self.denoiser, self.vae, self.text_encoder):
            part.to(device=device, dtype=dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        own = self.denoiser.config.sample_size
        h, w = (own, own) if isinstance(own, int) else own
        return (
            self.denoiser.config.in_channels,
            height // factor if height else h,
            width // factor if width else w,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """``encoder_hidden_states [B, L, D]`` of the text encoder's last layer."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"encoder_hidden_states": self.text_encoder(ids.to(self.device))[0]}

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        e = self.denoiser(x.to(self._dtype), t, return_dict=False, **condition)[0]
        return e.to(x.dtype)

    @torch.no_grad()
    def base_network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.denoiser.disable_adapters()
        try:
            return self.network(x, t, condition)
        finally:
            self.denoiser.enable_adapters()

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self._dtype) / self.vae.config.scaling_factor
        # clamp stops the gradient of saturated pixels, as the saved image would
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: Path, adapter: str = "default") -> None:
        import diffusers
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser, adapter_name=adapter))
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in layers.items()},
            safe_serialization=True,
            unet_lora_adapter_metadata=self.denoiser.peft_config[adapter].to_dict(),
        )

    def load_lora(self, path: str, scale: float) -> None:
        """Load a LoRA through diffusers and set its weight.

        Raises:
            EnvironmentFault: nothing there, or made for another model.
        """
        local = Path(path).expanduser()
        if local.is_dir() and not any(local.glob("*.safetensors")):
            raise EnvironmentFault(f"{path} holds no LoRA", remedy="the run may not be finished: look at manifest.json")
        if not local.exists() and (path.count("/") != 1 or local.suffix or path.startswith((".", "/", "~"))):
            raise EnvironmentFault(
                f"no LoRA at {path}", remedy="give a run folder or a .safetensors file made for this model"
            )
        try:
            where = str(local) if local.exists() else path
            self._pipeline.load_lora_weights(where, adapter_name="lora", use_safetensors=True)
            self._pipeline.set_adapters(["lora"], [scale])
        # a hub id can fail in any way a network can
        except Exception as fault:
            raise EnvironmentFault(
                f"cannot load the LoRA {path} into {self.source}: {str(fault).strip().splitlines()[0]}",
                remedy="give a run folder or LoRA file made for this model (a name like a/b is looked up on the hub)",
            ) from fault
        self.denoiser.eval().requires_grad_(False)
