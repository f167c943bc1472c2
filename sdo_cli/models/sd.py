"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, UNet (ε or v), KL autoencoder."""

from sdo_cli.models.family import DiffusersFamily
from sdo_cli.sampling.guidance import Condition


class StableDiffusion(DiffusersFamily):
    """The ``sd`` family."""

    name = "sd"
    pipeline_class = "StableDiffusionPipeline"

    def _embed(self, prompts: list[str]) -> Condition:
        """``encoder_hidden_states [B, L, D]`` of the text encoder's last layer."""
        device = self.pipeline.text_encoder.device
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, device, 1, False)[0]}
