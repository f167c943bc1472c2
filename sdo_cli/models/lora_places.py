"""Which layers of a model a name in a LoRA file may stand for, whatever program wrote it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sdo_cli.models.kohya import PREFIXES, sgm_name
from sdo_cli.models.lora_files import COMPONENTS, DENOISERS, Source, published
from sdo_cli.models.mmdit_names import original

# how programs begin the names of a part, beside kohya's underscores; diffusers' own names first
_DOTTED = {
    **{f"{component}.": component for component in COMPONENTS},
    "text_encoder_3.": "text_encoder_3",
    "diffusion_model.": "denoiser",
    "model.diffusion_model.": "denoiser",
}


@dataclass(frozen=True)
class Place:
    """A layer of the model that a name stands for; ``third`` and ``swapped`` as in :mod:`.mmdit_names`."""

    component: str
    module: str
    layer: Any
    third: int | None = None
    swapped: bool = False


Pair = dict[str, Tensor]


def places_of(parts: Mapping[str, nn.Module], family: str) -> dict[tuple[str, str], list[Place]]:
    """Places by component and name, dots written as underscores: programs write either."""
    places: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for component, part in parts.items():
        each = getattr(getattr(part, "config", None), "layers_per_block", None)
        modules = dict(_layers_of(component, part))
        last = max((int(name.split(".")[1]) for name in modules if name.startswith("transformer_blocks.")), default=0)
        for module, layer in modules.items():
            place = Place(component, module, layer)
            for name in _names(component, module, family, each or 2):
                if place not in places[component, _flat(name)]:
                    places[component, _flat(name)].append(place)
            if component == "transformer" and (there := original(module, last_block=last)) is not None:
                place = Place(component, module, layer, there.third, there.swapped)
                if there.name != module:
                    places[component, _flat(there.name)].append(place)
    return dict(places)


def _layers_of(component: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in part.named_modules():
        # beside another adapter the layer itself lies one level deeper
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in f".{name}":
            yield published(component, name.removesuffix(".base_layer")), module


def _names(component: str, module: str, family: str, each: int) -> Iterator[str]:
    yield module
    if component.startswith("text_encoder"):
        yield module.removeprefix("text_model.")
    if component != "unet":
        return
    try:
        name = sgm_name(module, each)
    except KeyError:
        return
    yield name
    if ".upsamplers." in module:
        # without attention before it, as in SD 1.x's first block
        yield name.replace(".2.", ".1.", 1)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def find(
    name: str,
    pair: Pair,
    places: Mapping[tuple[str, str], list[Place]],
    source: Source,
    parts: Mapping[str, nn.Module],
) -> list[Place]:
    """The layers a name stands for, all of them or none."""
    for component, rest in _readings(name, source, parts):
        found = places.get((component, _flat(rest)), [])
        thirds = sorted((place for place in found if place.third is not None), key=lambda place: place.third or 0)
        # one matrix for queries, keys and values: all three of them, or a layer of its own
        chosen = thirds if len(thirds) == 3 and _rows(pair) == 3 * thirds[0].layer.weight.shape[0] else found
        if chosen and all(_fits(place, pair) for place in chosen):
            return chosen if chosen is thirds else chosen[:1]
    return []


def _readings(name: str, source: Source, parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Components a name may be of, with the rest of it."""
    denoiser = next((component for component in DENOISERS if component in parts), "unet")
    if source.component is not None:
        yield source.component, name
        return
    for prefix, component in _DOTTED.items():
        if name.startswith(prefix):
            yield (denoiser if component == "denoiser" else component), name.removeprefix(prefix)
            return
    for prefixes in PREFIXES.values():
        for component, starts in prefixes.items():
            for start in starts:
                if name.startswith(f"{start}_") and component in parts:
                    yield component, name.removeprefix(f"{start}_")
    if name.startswith("lora_unet_"):
        # sd-scripts calls SD 3's transformer so
        yield denoiser, name.removeprefix("lora_unet_")
    if not name.startswith("lora_"):
        yield denoiser, name


def _rows(pair: Pair) -> int:
    return int(pair["up"].shape[0])


def _fits(place: Place, pair: Pair) -> bool:
    down, up, weight = pair["down"], pair["up"], place.layer.weight
    rows = weight.shape[0] * (3 if place.third is not None else 1)
    if up.shape[0] != rows or up.shape[1:].numel() != down.shape[0] or down.shape[0] == 0:
        return False
    if "mid" in pair:
        return weight.dim() == 4 and pair["mid"].shape == (len(down), len(down), *weight.shape[2:])
    # a projection may stand as a matrix or as a convolution of one pixel
    return bool(down.shape[1] == weight.shape[1]) and down[0, 0].numel() == weight[0, 0].numel()
