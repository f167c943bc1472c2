"""sdo: fine-tune Stable Diffusion on differentiable rewards."""

__version__ = "0.1.0"
