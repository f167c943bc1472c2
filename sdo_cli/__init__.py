"""sdo: fine-tune Stable Diffusion on differentiable rewards."""

from sdo_cli.threads import set_up

__version__ = "0.1.0"

# before anything below can import torch
set_up()
