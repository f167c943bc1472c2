"""LoRA files of diffusers and of kohya's programs as one thing: layers with their true alpha.

diffusers' loader is right for its own files, so those are left to it. Of kohya files it keeps one alpha for all
attention layers (0.42: per-layer alphas are filed under names that match no module), refuses text encoders without an
output projection, and ignores layers that the model lacks; so they are rewritten first (:func:`as_diffusers`).
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.embedded import lora_place
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import cached_file
from sdo_cli.installed import sdo
from sdo_cli.models.catalog import LORA_FILE, hub_lora
from sdo_cli.models.kohya import PREFIXES, kohya_names

NAME = LORA_FILE
METADATA_KEY = "lora_adapter_metadata"
_DENOISERS = ("unet", "transformer")
COMPONENTS = (*_DENOISERS, "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraLayer:
    """``W + (alpha / rank) up @ down``.

    Attributes:
        down: ``[rank, in]`` for linear layers, ``[rank, in, k, k]`` for convolutions.
        up: ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: as kohya means it: the factor is alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


# by component and module name (text encoders with ``text_model.``, as in published files)
Layers = dict[str, dict[str, LoraLayer]]


def lora_path(source: Path) -> Path:
    """The file itself, or the one in a run folder.

    Raises:
        EnvironmentFault: there is none.
    """
    source = Path(lora_place(str(source)))
    path = source / NAME if source.is_dir() else source
    if not path.is_file():
        what = f"{source} holds no {NAME}" if source.is_dir() else f"no LoRA at {source}"
        raise EnvironmentFault(what, remedy="give the folder of a finished run, or a LoRA file")
    return path


def lora_file(path: str) -> Path | None:
    """The weight file behind a run folder, path or hub id; None for one that is not on this machine."""
    if (on_hub := hub_lora(path)) is not None:
        return cached_file(on_hub)
    place = Path(lora_place(path)).expanduser()
    if place.is_dir():
        return place / NAME if (place / NAME).is_file() else next(iter(sorted(place.glob("*.safetensors"))), None)
    return place if place.is_file() else None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        EnvironmentFault: it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise EnvironmentFault(f"{path} is no safetensors file", remedy="give a LoRA in that format") from fault


def is_kohya(keys: Mapping[str, object]) -> bool:
    prefixes = {f"{prefix}_" for parts in PREFIXES.values() for names in parts.values() for prefix in names}
    return bool(keys) and all(key.startswith(tuple(prefixes)) for key in keys)


def read_diffusers(path: Path) -> Layers:
    """Read a LoRA in diffusers' layout; without adapter metadata alpha is the rank, as diffusers takes it.

    Raises:
        EnvironmentFault: no LoRA, another layout, or more than plain LoRA (DoRA, biases).
    """
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    tensors, metadata = read_tensors(path)
    components = sorted({key.partition(".")[0] for key in tensors})
    if is_kohya(tensors):
        raise EnvironmentFault(
            f"{path} has kohya's names, which only a model can resolve",
            remedy=f"write it as diffusers' first: {sdo('export')} … --format diffusers --model …",
        )
    if strange := [component for component in components if component not in COMPONENTS]:
        raise EnvironmentFault(
            f"{path} is no LoRA in diffusers' layout: it holds {strange[0]}", remedy="give a file that diffusers wrote"
        )
    configs = json.loads(metadata.get(METADATA_KEY, "{}"))
    layers: Layers = {}
    for component in components:
        part = {key.removeprefix(f"{component}."): t for key, t in tensors.items() if key.startswith(f"{component}.")}
        if component in _DENOISERS:
            part = convert_unet_state_dict_to_peft(part)
        else:
            old = any("to_out_lora" in key for key in part)
            part = convert_state_dict_to_peft(part, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS)
        halves = _halves(part, ".lora_A.weight", ".lora_B.weight", path)
        config = {k.removeprefix(f"{component}."): v for k, v in configs.items() if k.startswith(f"{component}.")}
        layers[component] = {
            published(component, module): LoraLayer(down, up, alpha_of(config, module, rank=down.shape[0]))
            for module, (down, up) in halves.items()
        }
    return layers


def read_kohya(path: Path, parts: Mapping[str, nn.Module], *, family: str) -> Layers:
    """Read a LoRA with kohya's names.

    Args:
        parts: the model's modules by component, on any device (``meta`` will do): names with underscores for dots
            can only be read by who knows the modules.
        family: ``sd``, ``sdxl`` or ``sd3``.

    Raises:
        EnvironmentFault: layers this model has not, of other sizes, or more than plain LoRA (LoHa, DoRA, …).
    """
    tensors, _ = read_tensors(path)
    alphas = {key.removesuffix(".alpha"): t.item() for key, t in tensors.items() if key.endswith(".alpha")}
    weights = {key: t for key, t in tensors.items() if not key.endswith(".alpha")}
    halves = _halves(weights, ".lora_down.weight", ".lora_up.weight", path)
    places = _places(parts, family)
    strange = [name for name in halves if name not in places or not _fits(places[name][2], *halves[name])]
    if strange:
        raise EnvironmentFault(
            f"{path} was made for another model: {len(strange)} of {len(halves)} layers are not in this one, "
            f"the first is {strange[0]}",
            remedy=f"give a LoRA for a model of the family {family} and of this size",
        )
    layers: Layers = {}
    for name, (down, up) in halves.items():
        component, module, _ = places[name]
        layers.setdefault(component, {})[module] = LoraLayer(down, up, alphas.get(name, float(down.shape[0])))
    return layers


def _halves(state: Mapping[str, Tensor], down: str, up: str, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    modules = [key.removesuffix(down) for key in state if key.endswith(down)]
    whole = {module: (state[module + down], state[module + up]) for module in modules if module + up in state}
    rest = sorted(state.keys() - {module + half for module in whole for half in (down, up)})
    if rest or not whole:
        what = f"holds {rest[0]}" if rest else "holds no LoRA layers"
        raise EnvironmentFault(f"{path} is no plain LoRA: it {what}", remedy="give a LoRA of down and up matrices only")
    return whole


def _places(parts: Mapping[str, nn.Module], family: str) -> dict[str, tuple[str, str, nn.Module]]:
    """Component, module name and module behind every name a kohya file may use."""
    unet: Any = parts.get("unet")
    each = unet.config.layers_per_block if unet is not None and family == "sdxl" else 2
    places: dict[str, tuple[str, str, nn.Module]] = {}
    for component in PREFIXES[family].keys() & parts.keys():
        for name, module in parts[component].named_modules():
            # beside another adapter the layer itself lies one level deeper
            if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in f".{name}":
                plain = published(component, name.removesuffix(".base_layer"))
                for key in kohya_names(component, plain, family=family, layers_per_block=each):
                    places[key] = (component, plain, module)
    return places


def _fits(module: Any, down: Tensor, up: Tensor) -> bool:
    return down.shape[1:] == module.weight.shape[1:] and up.shape[0] == module.weight.shape[0]


def published(component: str, module: str) -> str:
    """The name in published files: newer transformers drop the level ``text_model`` of CLIPTextModel."""
    bare = component in _DENOISERS or module.startswith(("text_model.", "text_projection"))
    return module if bare else f"text_model.{module}"


def in_this_transformers(component: str, module: str, *, family: str) -> str:
    """A published name as the installed transformers has it: from 5 on CLIPTextModel has no level ``text_model``."""
    if component != "text_encoder" or family == "sd3" or _has_text_model():
        return module
    return module.removeprefix("text_model.")


@cache
def _has_text_model() -> bool:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return hasattr(CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)), "text_model")


def alpha_of(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    """kohya's alpha of a layer under peft's settings: its pattern's, or the adapter's, or the rank."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, module), config.get("lora_alpha") or rank))
    # rank-stabilised LoRA divides by the square root of the rank
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def adapter_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """peft's ``LoraConfig`` as a dict: the commonest rank and alpha, and what differs from them by layer."""
    from peft import LoraConfig

    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    # matched from the end of a module's name, so they fit with and without `text_model.`
    names = {module: module.removeprefix("text_model.") for module in layers}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(names.values()),
        rank_pattern={names[m]: layer.rank for m, layer in layers.items() if layer.rank != rank},
        alpha_pattern={names[m]: layer.alpha for m, layer in layers.items() if layer.alpha != alpha},
    )
    return config.to_dict() | {"target_modules": sorted(names.values())}


def write_diffusers(layers: Layers, path: Path) -> None:
    """Write one file that ``pipeline.load_lora_weights`` reads, alpha of every layer included."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, modules in layers.items():
        # the loaders look for one spelling per part, and drop layers of a file with two
        down, up = (
            ("lora_A", "lora_B") if component in _DENOISERS else ("lora_linear_layer.down", "lora_linear_layer.up")
        )
        for module, layer in modules.items():
            tensors[f"{component}.{module}.{down}.weight"] = layer.down.contiguous()
            tensors[f"{component}.{module}.{up}.weight"] = layer.up.contiguous()
        settings |= {f"{component}.{key}": value for key, value in adapter_settings(modules).items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    save_file(tensors, path, metadata=metadata)


def kohya_tensors(layers: Layers, *, family: str, layers_per_block: int = 2) -> dict[str, Tensor]:
    """Every layer as ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha`` (an fp32 scalar).

    Raises:
        EnvironmentFault: a layer that has no such name.
    """
    state: dict[str, Tensor] = {}
    for component, modules in layers.items():
        for module, layer in modules.items():
            try:
                name = kohya_names(component, module, family=family, layers_per_block=layers_per_block)[0]
            except KeyError as fault:
                raise EnvironmentFault(
                    f"no kohya name for {component}.{module} of a {family} model", remedy="use --format peft"
                ) from fault
            state |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
            state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


@contextmanager
def as_diffusers(path: Path, parts: Mapping[str, nn.Module], *, family: str) -> Iterator[Path]:
    """The LoRA at ``path`` as a file that diffusers loads as it was meant; itself, unless it has kohya's names.

    Raises:
        EnvironmentFault: as :func:`read_kohya`.
    """
    tensors, _ = read_tensors(path)
    if not is_kohya(tensors):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sdo-lora-") as folder:
        write_diffusers(read_kohya(path, parts, family=family), Path(folder) / NAME)
        yield Path(folder) / NAME
