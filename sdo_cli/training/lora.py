"""What is trained: a fresh adapter, one to go on with, or every weight of the denoiser."""

import torch
from torch import nn

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.models.base import Family
from sdo_cli.models.lora_stack import is_plain
from sdo_cli.models.lora_targets import nowhere, said, targets_of
from sdo_cli.recipe.schema import LoraSpec
from sdo_cli.seeding import key_to_seed

ADAPTER = "default"


def add_lora(family: Family, spec: LoraSpec, *, seed: int) -> list[nn.Parameter]:
    """Put a LoRA into the family's denoiser (and text encoders) and return its parameters, in fp32.

    Every part stays in evaluation mode: dropout off is a condition of the three-stage engine.

    Raises:
        RecipeFault: ``target_modules`` name nothing in this model, or it has no text encoder that can carry a LoRA.
        EnvironmentFault: ``start_from`` cannot be loaded.
    """
    if spec.text_encoder and not family.text_encoders:
        raise RecipeFault([f"lora.text_encoder: {family.source} has no text encoder; take it out"])
    if spec.start_from is not None:
        if not is_plain(spec.start_from):
            raise RecipeFault([f"lora.start_from: {spec.start_from}: training goes on from one LoRA at its own weight"])
        family.load_lora(spec.start_from, adapter=ADAPTER)
        _require_layers(family, spec)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_to_seed(seed, "lora-init"))
            _add_fresh(family, family.denoiser, targets_of(family, spec.layers, spec.target_modules), spec)
            for encoder in family.text_encoders.values() if spec.text_encoder else ():
                _add_fresh(family, encoder, list(family.text_lora_targets), spec)
    if spec.text_encoder:
        family.train_text_encoders()
    trained = [family.denoiser, *(family.text_encoders.values() if spec.text_encoder else ())]
    for parameter in (p for part in trained for name, p in part.named_parameters() if f".{ADAPTER}." in name):
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return trainable(family)


def _add_fresh(family: Family, part: nn.Module, targets: list[str], spec: LoraSpec) -> None:
    from peft import LoraConfig

    if missing := nowhere(part, targets):
        raise RecipeFault([said(missing, family.source, list(family.lora_targets))])
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha or spec.rank, target_modules=targets, init_lora_weights="gaussian"
    )
    part.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    for name, parameter in part.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)


def _require_layers(family: Family, spec: LoraSpec) -> None:
    """What is to be trained must be in the file that was loaded."""
    wanted = {"the denoiser": family.denoiser}
    if spec.text_encoder:
        wanted |= family.text_encoders
    if not spec.text_encoder and any(name in family.text_encoders for name in family.adapted(ADAPTER)):
        raise EnvironmentFault(
            f"the LoRA {spec.start_from} has layers for the text encoders, which would be lost",
            remedy="set lora.text_encoder=true to train them on",
        )
    missing = [name for name, part in wanted.items() if part not in family.adapted(ADAPTER).values()]
    if missing:
        raise EnvironmentFault(
            f"the LoRA {spec.start_from} has no layers for {' and '.join(missing)}",
            remedy="set lora.text_encoder to false, or start from another LoRA",
        )


def train_everything(family: Family) -> None:
    """All weights of the denoiser."""
    family.denoiser.requires_grad_(True)


def in_call_order(family: Family, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """As calls come to them: encoders first; a UNet names its middle after its last blocks."""
    parts = ("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out", "norm_out", "proj_out")
    place = {
        id(p): 1 + next((number for number, part in enumerate(parts, start=1) if name.startswith(part)), 0)
        for name, p in family.denoiser.named_parameters()
    }
    if not any(name.startswith("down_blocks") for name, _ in family.denoiser.named_parameters()):
        # a transformer names its parts in order
        place = dict.fromkeys(place, 1)
    return sorted(parameters, key=lambda p: place.get(id(p), 0))


def trainable(family: Family) -> list[nn.Parameter]:
    """Every parameter with a gradient, denoiser first."""
    parts = (family.denoiser, *family.text_encoders.values())
    return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
