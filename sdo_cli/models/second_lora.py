"""A LoRA beside the trained one that is switched on for some network calls only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.base import Family
from sdo_cli.models.lora_carried import weighted_dora
from sdo_cli.models.lora_files import find_lora
from sdo_cli.models.lora_paths import lora_place
from sdo_cli.models.lora_read import has_text_layers
from sdo_cli.models.lora_stack import is_plain
from sdo_cli.sampling.guidance import Condition, Network

NAME = "rollout"


def load_second(family: Family, path: str, *, scale: float = 1.0) -> str:
    """Load it, switched off and in the denoiser's precision; once per family, path and scale.

    Returns:
        The adapter's name.

    Raises:
        EnvironmentFault: nothing there, made for another model, or with layers for the text encoders.
    """
    place, known = (lora_place(path), scale), family.second_loras
    if place in known:
        return known[place]
    name, active = f"{NAME}{len(known) or ''}", _active(family.denoiser)
    parts = (family.denoiser, *family.text_encoders.values())
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    if not is_plain(path):
        raise EnvironmentFault(f"{path} is not one LoRA", remedy="name one; its weight is rollout.lora_scale")
    if has_text_layers(find_lora(path)):
        raise EnvironmentFault(
            f"the LoRA {path} has layers for the text encoders, and prompts are encoded once, for all calls",
            remedy="give one that was made for the denoiser alone",
        )
    family.load_lora(path, adapter=name)
    if scale != 1 and any(layer.lora_magnitude_vector for layer in _layers(family.denoiser) if name in layer.scaling):
        raise weighted_dora(path, scale)
    # loading froze all there is
    for parameter in trained:
        parameter.requires_grad_()
    for layer in _layers(family.denoiser):
        layer._active_adapter = list(active)
        if name in layer.scaling:
            layer.set_scale(name, scale)
    for key, parameter in family.denoiser.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.to(family.denoiser.dtype)
    known[place] = name
    return name


def network_with(family: Family, adapter: str) -> Network:
    """The family's network with this adapter too, beside those that are on; no gradient."""

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad(), _switched_on(family.denoiser, adapter):
            return family.network(x, t, condition)

    return network


@contextmanager
def _switched_on(denoiser: Any, adapter: str) -> Iterator[None]:
    # peft's own switch would also change what has gradients
    layers = list(_layers(denoiser))
    before = [layer._active_adapter for layer in layers]
    for layer, active in zip(layers, before, strict=True):
        layer._active_adapter = [*active, adapter]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _active(denoiser: Any) -> list[str]:
    return next((list(layer.active_adapters) for layer in _layers(denoiser)), [])


def _layers(denoiser: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in denoiser.modules() if isinstance(module, LoraLayer))
