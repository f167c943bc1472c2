"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP encoders and an optional T5."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from sdo_cli.models.family import DiffusersFamily
from sdo_cli.sampling.guidance import Condition


class StableDiffusion3(DiffusersFamily):
    """The ``sd3`` family (Esser et al. 2024, arXiv 2403.03206)."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    adaptable_encoders = ("text_encoder", "text_encoder_2")
    # latents are cut into patches of two
    size_multiple = 16
    skippable_names: ClassVar[Mapping[str, str]] = {
        "blocks": r"transformer_blocks\.\d+",
        "parts": r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)",
    }

    def _embed(self, prompts: list[str]) -> Condition:
        """``encoder_hidden_states [B, L_CLIP + L_T5, D]`` and ``pooled_projections [B, P]``.

        Without T5 its tokens are zeros, as the model was trained to bear.
        """
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(hidden_states=x, timestep=t, return_dict=False, **condition)[0]

    def _to_vae_scale(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _from_vae_scale(self, latents: Tensor) -> Tensor:
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _layers(self, part: nn.Module, adapter: str) -> dict[str, Tensor]:
        """SD 3's loader reads the transformer's layers under peft's names."""
        from peft import get_peft_model_state_dict

        if part is self.denoiser:
            return get_peft_model_state_dict(part, adapter_name=adapter)
        return super()._layers(part, adapter)
