"""Stable Diffusion XL: two text encoders, a pooled text embedding, image size as a condition."""

from functools import lru_cache

import torch
from torch import Tensor

from sdo_cli.models.family import DiffusersFamily
from sdo_cli.sampling.guidance import Condition


class StableDiffusionXL(DiffusersFamily):
    """The ``sdxl`` family (base model; Podell et al. 2023, arXiv 2307.01952)."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    adaptable_encoders = ("text_encoder", "text_encoder_2")

    def _vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The original VAE overflows in fp16 and is coarse in bf16; the repaired one says force_upcast: false."""
        return torch.float32 if self.vae.config.force_upcast else dtype

    def _embed(self, prompts: list[str]) -> Condition:
        """``encoder_hidden_states [B, L, D1 + D2]`` (last but one layers) and ``text_embeds [B, P]``."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def _embed_negative(self, prompt: str) -> Condition:
        """No negative prompt is all zeros for models trained that way, as the base model was."""
        condition = self._embed([prompt])
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            return {key: torch.zeros_like(value) for key, value in condition.items()}
        return condition

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = (side * self.vae_factor for side in x.shape[-2:])
        # original size, crop at the corner, target size: what the pipeline gives when nothing else is asked for
        time_ids = self._size(height, width, x.dtype, x.device)
        added = {"text_embeds": condition["text_embeds"], "time_ids": time_ids.expand(len(x), -1)}
        hidden = condition["encoder_hidden_states"]
        guidance = condition.get("timestep_cond")
        return self.denoiser(
            x, t, encoder_hidden_states=hidden, timestep_cond=guidance, added_cond_kwargs=added, return_dict=False
        )[0]

    @staticmethod
    @lru_cache(maxsize=16)
    def _size(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Made once: a copy to a device waits for everything that was asked of it before."""
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=device)

    def _to_vae_scale(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def _from_vae_scale(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation by channel, ``[1, C, 1, 1]``; 0 and 1 for a VAE that names none."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return latents.new_zeros(1, 1, 1, 1), latents.new_ones(1, 1, 1, 1)
        first, second = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return first, second
