"""AdamW, its state in fp32 or in 8 bits, and its relatives that set the rate, or the mean, themselves."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import install_extra
from sdo_cli.recipe.schema import Recipe

# settings of an optimizer that say how it computes and not what
KERNELS = ("fused", "foreach", "capturable")
# those of other packages: package, module, class, extra
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", "8bit"),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy", "prodigy"),
    "schedulefree": ("schedulefree", "schedulefree", "AdamWScheduleFree", "schedulefree"),
}


def make_adamw(recipe: Recipe, parameters: list[nn.Parameter], *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW, or the relative of it that the recipe names; beside mofasgd AdamW.

    Args:
        fused: one kernel for all tensors, where it is torch's AdamW.

    Raises:
        EnvironmentFault: one of another package that is not installed.
    """
    found: torch.optim.Optimizer = _class_of(recipe.optimizer)(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.adam_weight_decay,
        **_options(recipe, fused),
    )
    return found


def _options(recipe: Recipe, fused: bool) -> dict[str, Any]:
    if recipe.optimizer == "prodigy":
        # its authors': without it a warm-up makes the estimate of the rate too large
        return {"safeguard_warmup": recipe.lr_warmup_steps > 0}
    return {"fused": True} if fused and recipe.optimizer not in PACKAGES else {}


def _class_of(name: str) -> Any:
    if name not in PACKAGES:
        return torch.optim.AdamW
    package, module, kind, extra = PACKAGES[name]
    try:
        return getattr(import_module(module), kind)
    except ImportError as fault:
        raise EnvironmentFault(
            f"optimizer {name} needs the package {package}",
            remedy=f"{install_extra(extra)}, or set optimizer=adamw",
        ) from fault
