"""Whether a model carries a LoRA as its file has it: every layer, every number, every strength."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.lora_files import Layers, LoraLayer, published


def finish_loading(part: nn.Module, component: str, layers: Mapping[str, LoraLayer], adapter: str, path: Path) -> None:
    """Put DoRA's norms where transformers leaves them out, and compare what was loaded with the file.

    Args:
        layers: of this part, by published name.

    Raises:
        EnvironmentFault: a layer without its LoRA, with other numbers or at another strength.
    """
    found = {
        published(component, name): module
        for name, module in part.named_modules()
        if adapter in getattr(module, "lora_A", ())
    }
    wrong = sorted(set(layers) ^ set(found))
    for name, layer in layers.items() if not wrong else ():
        module = found[name]
        if layer.magnitude is not None:
            # transformers' load_adapter has no place for them in a text encoder, and starts from the base's own norms
            norms = module.lora_magnitude_vector[adapter].weight
            with torch.no_grad():
                norms.copy_(layer.magnitude.reshape(norms.shape))
        loaded = {"down": module.lora_A[adapter].weight, "up": module.lora_B[adapter].weight}
        same = _same(loaded["down"], layer.down) and _same(loaded["up"], layer.up)
        strength = module.scaling[adapter]
        if not same or not math.isclose(strength, layer.alpha / layer.rank, rel_tol=1e-6, abs_tol=1e-12):
            wrong.append(name)
    if wrong:
        raise EnvironmentFault(
            f"{path} was loaded in part: {len(wrong)} layers of the {component} are not as in the file, "
            f"{wrong[0]} first",
            remedy="report it, with the file",
        )


def refuse_weighted_dora(layers: Layers, scale: float, path: str) -> None:
    """peft scales the matrices and leaves the norms, so at weight 0 the base would not come back.

    Raises:
        EnvironmentFault: DoRA at another weight than 1.
    """
    if scale != 1 and any(layer.magnitude is not None for modules in layers.values() for layer in modules.values()):
        raise weighted_dora(path, scale)


def weighted_dora(path: str, scale: float) -> EnvironmentFault:
    return EnvironmentFault(
        f"{path} is DoRA, which has no weight but 1: it was asked for {scale:g}",
        remedy="leave the weight out; a LoRA that is no DoRA can be weighted",
    )


@contextmanager
def without_report() -> Iterator[None]:
    """transformers lists DoRA's norms as unexpected; what it leaves out is put in and compared here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _same(loaded: Tensor, wanted: Tensor) -> bool:
    """As the model's precision rounds it."""
    return loaded.shape == wanted.shape and bool(
        (loaded.detach() == wanted.to(loaded.device, loaded.dtype)).all().item()
    )
