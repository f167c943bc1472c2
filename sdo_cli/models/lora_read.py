"""Any program's LoRA onto a model's layers: every pair of the file has its layer, or the file is refused."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import sdo
from sdo_cli.models.lora_files import (
    COMPONENTS,
    METADATA_KEY,
    NAME,
    Layers,
    LoraLayer,
    alpha_of,
    published,
    read_tensors,
    settings_in,
    sources_of,
    write_diffusers,
)
from sdo_cli.models.lora_keys import kind_of, parse
from sdo_cli.models.lora_places import Pair, Place, find, places_of


def read_lora(path: Path, parts: Mapping[str, nn.Module], *, family: str) -> Layers:
    """Every layer of a LoRA file or folder, by this model's components and modules.

    Args:
        path: a file, a run folder, or a folder of peft's.
        parts: the model's modules by component, on any device (``meta`` will do).
        family: ``sd``, ``sdxl`` or ``sd3``.

    Raises:
        EnvironmentFault: layers this model has not, of other sizes, another kind of adapter, numbers that are not
            finite, or several files.
    """
    places, layers, unknown, total = places_of(parts, family), Layers(), list[str](), 0
    for source in sources_of(path):
        tensors, metadata = read_tensors(source.file)
        check_finite(tensors, source.file)
        pairs = pairs_of(tensors, source.file)
        total += len(pairs)
        for name, pair in pairs.items():
            found = find(name, pair, places, source, parts)
            if not found:
                unknown.append(name)
            for place in found:
                config = source.config or _config_of(metadata, place.component, source.file)
                if place.module in layers.setdefault(place.component, {}):
                    raise EnvironmentFault(
                        f"{path} has two pairs for one layer, {place.component}.{place.module}; the second is {name}",
                        remedy="keep one of them: a file holds one LoRA",
                    )
                layers[place.component][place.module] = _layer(pair, place, config)
    if unknown:
        raise EnvironmentFault(
            f"{path} was made for another model: {len(unknown)} of {total} layers are not in this one, "
            f"the first is {unknown[0]}",
            remedy=f"give a LoRA for a model of the family {family} and of this size",
        )
    for component, modules in layers.items():
        plain = [module for module, layer in modules.items() if layer.magnitude is None]
        if 0 < len(plain) < len(modules):
            raise EnvironmentFault(
                f"{path} is DoRA in {len(modules) - len(plain)} of {len(modules)} layers of the {component}, and plain "
                f"in the others, {plain[0]} first: peft takes one kind for all",
                remedy="give one of a single kind",
            )
    return layers


@contextmanager
def as_diffusers(path: Path, parts: Mapping[str, nn.Module], *, family: str) -> Iterator[tuple[Path, Layers]]:
    """The LoRA as a file that diffusers loads whole, and its layers; whoever wrote it.

    diffusers' own loader keeps one alpha for kohya's attention layers (0.42), takes one of two spellings in a file and
    drops the rest, and passes over layers that the model lacks, without a word.

    Raises:
        EnvironmentFault: as :func:`read_lora`.
    """
    layers = read_lora(path, parts, family=family)
    with tempfile.TemporaryDirectory(prefix="sdo-lora-") as folder:
        write_diffusers(layers, Path(folder) / NAME)
        yield Path(folder) / NAME, layers


def read_diffusers(path: Path) -> Layers:
    """Read a LoRA that says itself what its layers are: diffusers' layout, or peft's folders by component.

    Without adapter metadata and ``.alpha`` keys alpha is the rank, as diffusers takes it.

    Raises:
        EnvironmentFault: no LoRA, or names that only a model can resolve.
    """
    layers: Layers = {}
    for source in sources_of(path):
        tensors, metadata = read_tensors(source.file)
        check_finite(tensors, source.file)
        for name, pair in pairs_of(tensors, source.file).items():
            component, _, module = (source.component or "", "", name) if source.component else name.partition(".")
            if component not in COMPONENTS or "mid" in pair:
                raise EnvironmentFault(
                    f"{path} has names that only a model can resolve, the first is {name}",
                    remedy=f"write it as diffusers' first: {sdo('export')} … --format diffusers --model …",
                )
            module, config = published(component, module), source.config or _config_of(metadata, component, source.file)
            down, up, magnitude = _computable(pair["down"]), _computable(pair["up"]), pair.get("magnitude")
            alpha = pair["alpha"].item() if "alpha" in pair else alpha_of(config, module, rank=down.shape[0])
            norms = None if magnitude is None else _computable(magnitude).flatten()
            layers.setdefault(component, {})[module] = LoraLayer(down, up, float(alpha), norms)
    return layers


def has_text_layers(path: Path) -> bool:
    """Whether a LoRA changes a text encoder, by its names, whatever stands before them."""
    return any(
        (source.component or "").startswith("text_encoder")
        or any(re.search(r"(?:^|\.)(?:text_encoder(?:_2)?\.|lora_te)", key) for key in read_tensors(source.file)[0])
        for source in sources_of(path)
    )


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises EnvironmentFault for numbers that are not finite (black pictures) or no floats."""
    for key, tensor in tensors.items():
        if tensor.dim() > 1 and not tensor.is_floating_point():
            raise EnvironmentFault(
                f"{path}: {key} holds numbers of {tensor.dtype}, which are no weights as they are",
                remedy="give the LoRA in fp16, bf16 or fp32",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise EnvironmentFault(
                f"{path} is damaged: {key} holds numbers that are not finite",
                remedy="fetch the file again, or take an earlier checkpoint of its training",
            )


def pairs_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Pair]:
    """The parts of every layer by its name in the file.

    Raises:
        EnvironmentFault: something else than pairs of matrices, half a pair, or several adapters.
    """
    pairs: dict[str, Pair] = defaultdict(dict)
    strange, adapters = [], set[str]()
    for key, tensor in tensors.items():
        piece = parse(key)
        if piece is None:
            strange.append(key)
            continue
        if piece.adapter:
            adapters.add(piece.adapter)
        if piece.role in pairs[piece.name] and len(adapters) < 2:
            raise EnvironmentFault(f"{path} holds {piece.name} twice", remedy="give a file with one adapter")
        if piece.role == "alpha" and tensor.numel() != 1:
            raise EnvironmentFault(
                f"{path} is damaged: {key} holds {tensor.numel()} numbers, not one", remedy="fetch the file again"
            )
        if key.endswith(".dora_scale") and tensor.dim() == 4 and tensor.shape[0] == 1 < tensor.shape[1]:
            # peft has rows in this shape, LyCORIS columns
            raise EnvironmentFault(
                f"the DoRA of {piece.name} has {tuple(tensor.shape)} norms, those of columns",
                remedy="give one trained with wd_on_output, sd-scripts' and peft's way",
            )
        pairs[piece.name][piece.role] = tensor
    if len(adapters) > 1:
        raise EnvironmentFault(
            f"{path} holds several adapters: {', '.join(sorted(adapters))}", remedy="give a file with one"
        )
    halves = [name for name, pair in pairs.items() if not {"down", "up"} <= pair.keys()]
    if strange or halves or not pairs:
        raise _refusal(path, strange, halves, pairs)
    return dict(pairs)


def _refusal(path: Path, strange: list[str], halves: list[str], pairs: Mapping[str, Pair]) -> EnvironmentFault:
    if kind := kind_of(strange):
        return EnvironmentFault(
            f"{path} is {kind}, which is not applied as a LoRA: it holds {strange[0]}",
            remedy="give a plain LoRA; or merge this file into its model with the program that made it, and give that",
        )
    if strange:
        what = f"holds {strange[0]}"
    else:
        what = f"has {' and '.join(pairs[halves[0]])} of {halves[0]} alone" if halves else "holds no LoRA layers"
    return EnvironmentFault(f"{path} is no plain LoRA: it {what}", remedy="give a LoRA of down and up matrices only")


def _config_of(metadata: Mapping[str, str], component: str, path: Path) -> dict[str, Any]:
    """What diffusers noted of peft's settings."""
    return settings_in(metadata.get(METADATA_KEY, "{}"), f"{METADATA_KEY} in the header of {path}", f"{component}.")


def _layer(pair: Pair, place: Place, config: Mapping[str, Any]) -> LoraLayer:
    """The pair in the shapes of the layer it belongs to."""
    weight, rank = place.layer.weight, pair["down"].shape[0]
    # float8 knows no arithmetic; half precision holds all of it
    down, up = (_computable(pair[half]) for half in ("down", "up"))
    if "mid" in pair:
        # LyCORIS' three factors of a convolution: the first two are one, which half precision would round
        down, up = torch.einsum("rskl,si->rikl", pair["mid"].float(), down.flatten(1).float()), up.float()
    down, up = down.reshape(rank, *weight.shape[1:]), up.reshape(len(up), rank, *[1] * (weight.dim() - 2))
    if place.third is not None:
        # a file's writer refuses tensors that share memory
        down, up = down.clone(), up.chunk(3)[place.third].clone()
    if place.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    module = place.module
    alpha = pair["alpha"].item() if "alpha" in pair else alpha_of(config, module, rank=rank)
    magnitude = pair.get("magnitude")
    return LoraLayer(down, up, float(alpha), None if magnitude is None else _magnitude(magnitude, place))


def _computable(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype.itemsize == 1 else tensor


def _magnitude(magnitude: Tensor, place: Place) -> Tensor:
    """Norms of a weight's rows, ``[out]``.

    Raises:
        EnvironmentFault: norms of its columns, which LyCORIS writes for ``wd_on_output=False``.
    """
    rows = place.layer.weight.shape[0]
    if place.third is not None or place.swapped or magnitude.numel() != rows or magnitude.shape[0] not in (1, rows):
        raise EnvironmentFault(
            f"the DoRA of {place.module} has {tuple(magnitude.shape)} norms, not one for each of {rows} rows",
            remedy="give one trained with wd_on_output, sd-scripts' and peft's way",
        )
    if magnitude.shape[0] == 1 and magnitude.dim() == 2 and rows == place.layer.weight.shape[1]:
        raise EnvironmentFault(
            f"the DoRA of {place.module} may have norms of rows or of columns: {tuple(magnitude.shape)} fits both",
            remedy="give one trained with wd_on_output, sd-scripts' and peft's way",
        )
    return _computable(magnitude).flatten()
