"""AdamW, its state in fp32 or in 8 bits."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import install_extra
from sdo_cli.recipe.schema import Recipe

# settings of an optimizer that say how it computes and not what
KERNELS = ("fused", "foreach", "capturable")


def make_adamw(recipe: Recipe, parameters: list[nn.Parameter], *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW, its state in fp32 or in 8 bits.

    Args:
        fused: one kernel for all tensors.

    Raises:
        EnvironmentFault: ``adamw8bit`` without bitsandbytes.
    """
    options = {"fused": True} if fused and recipe.optimizer != "adamw8bit" else {}
    return _adamw_class(recipe.optimizer)(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.adam_weight_decay,
        **options,
    )


def _adamw_class(name: str) -> Any:
    # beside mofasgd it steps what is no matrix
    if name in ("adamw", "mofasgd"):
        return torch.optim.AdamW
    try:
        return import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as fault:
        raise EnvironmentFault(
            "optimizer adamw8bit needs the package bitsandbytes",
            remedy=f"{install_extra('8bit')}, or set optimizer=adamw",
        ) from fault
