"""The adapter that is trained."""

import torch
from torch import nn

from sdo_cli.errors import RecipeFault
from sdo_cli.models.base import Family
from sdo_cli.recipe.schema import LoraSpec
from sdo_cli.seeding import key_to_seed

ADAPTER = "default"


def add_lora(family: Family, spec: LoraSpec, *, seed: int) -> list[nn.Parameter]:
    """Put a fresh LoRA into the family's denoiser and return its parameters, in fp32.

    The denoiser stays in evaluation mode: dropout off is a condition of the three-stage engine.

    Raises:
        RecipeFault: ``target_modules`` name nothing in this model.
    """
    from peft import LoraConfig

    targets = list(spec.target_modules or family.lora_targets)
    layers = [name for name, _ in family.denoiser.named_modules()]
    nowhere = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if nowhere:
        known = ", ".join(family.lora_targets)
        raise RecipeFault([f"lora.target_modules: {', '.join(nowhere)} names no layer of {family.source}; try {known}"])
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha or spec.rank, target_modules=targets, init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_to_seed(seed, "lora-init"))
        family.denoiser.add_adapter(config, adapter_name=ADAPTER)
    parameters = [p for p in family.denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters
