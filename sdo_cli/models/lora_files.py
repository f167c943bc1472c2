"""Where a LoRA lies, its layers as one thing whoever wrote them, and what is written: diffusers' and kohya's files."""

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import file_hash
from sdo_cli.hub import cached_file, find_file
from sdo_cli.models.catalog import LORA_FILE, hub_lora
from sdo_cli.models.kohya import kohya_names
from sdo_cli.models.lora_paths import RUN_MARK, at_checkpoint, lora_place, step_of, what_there_is
from sdo_cli.models.lora_stack import is_plain, stack_of

NAME = LORA_FILE
METADATA_KEY = "lora_adapter_metadata"
_PEFT = "adapter_model.safetensors"
DENOISERS = ("unet", "transformer")
# of the LoRAs that lie beside one that is not there
MOST_NAMED = 6
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraLayer:
    """``W + (alpha / rank) up @ down``.

    Attributes:
        down: ``[rank, in]`` for linear layers, ``[rank, in, k, k]`` for convolutions.
        up: ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: as kohya means it: the factor is alpha / rank.
        magnitude: of DoRA, ``[out]``: the norms of the rows of the sum.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


# by component and module name (text encoders with ``text_model.``, as in published files)
Layers = dict[str, dict[str, LoraLayer]]


@dataclass(frozen=True)
class Source:
    """One file of a LoRA.

    Attributes:
        component: what its names are of, where they do not say (peft writes a folder for each).
        config: peft's ``adapter_config.json`` beside it.
    """

    file: Path
    component: str | None = None
    config: Mapping[str, Any] | None = None


def sources_of(path: Path) -> list[Source]:
    """The files behind a LoRA file, a run folder, or a folder of peft's (of one network, or with one for each).

    Raises:
        EnvironmentFault: there is none, or several that could be meant.
    """
    given = str(path)
    path = Path(lora_place(given))
    if path.is_file():
        return [_source(path)]
    if not path.is_dir():
        raise EnvironmentFault(f"no LoRA at {path}", remedy=missing_remedy(given))
    if (path / NAME).is_file():
        return [_source(path / NAME)]
    folders = sorted(place.parent.name for place in path.glob("*/adapter_config.json"))
    if (path / _PEFT).is_file() and not folders:
        return [_source(path / _PEFT)]
    if (path / _PEFT).is_file() or set(folders) - {name for name in COMPONENTS if (path / name / _PEFT).is_file()}:
        raise EnvironmentFault(
            f"{path} holds adapters of peft that are not read together: {', '.join(folders)}"
            f"{' beside one of its own' * (path / _PEFT).is_file()}",
            remedy=f"leave folders called {', '.join(COMPONENTS)} with an {_PEFT} in each, or give one of them",
        )
    if parts := [name for name in COMPONENTS if (path / name / _PEFT).is_file()]:
        return [_source(path / name / _PEFT, name) for name in parts]
    # a run's own is called otherwise: what else lies in its folder was exported, of a checkpoint perhaps
    files = [] if (path / RUN_MARK).is_file() else sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
        raise EnvironmentFault(f"{path} holds {len(files)} LoRA files: {names}", remedy="name the one that is meant")
    if not files:
        raise EnvironmentFault(f"{path} holds no LoRA", remedy=missing_remedy(given))
    return [_source(files[0])]


def missing_remedy(name: str) -> str:
    """What to give in place of a name without a LoRA behind it."""
    found = at_checkpoint(name)
    place = Path(name).expanduser()
    run = found[0] if found else place if step_of(place) is None else place.parent.parent
    if marks := what_there_is(run):
        there = f"the run's adapters: {run}{f', {run}'.join(marks.split(', '))}"
        return there if found or step_of(place) is not None else f"the run is not finished; {there}"
    siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() and not place.exists() else []
    if near := difflib.get_close_matches(place.name, siblings, n=1, cutoff=0.6):
        return f"did you mean {place.with_name(near[0])}?"
    if beside := [place.with_name(name) for name in sorted(siblings) if (place.with_name(name) / NAME).is_file()]:
        more = f" and {len(beside) - MOST_NAMED} more" if len(beside) > MOST_NAMED else ""
        return f"there are {', '.join(map(str, beside[:MOST_NAMED]))}{more}"
    return "give the folder of a finished run (its manifest.json says how it ended), or a LoRA file"


def _source(file: Path, component: str | None = None) -> Source:
    config = file.parent / "adapter_config.json"
    if file.name != _PEFT or not config.is_file():
        return Source(file, component)
    settings = settings_in(config.read_bytes(), str(config))
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise EnvironmentFault(
            f"{file.parent} was trained beside a base model that peft changed at its start (init_lora_weights {start})",
            remedy="convert it with peft: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    return Source(file, component, settings)


def settings_in(text: str | bytes, where: str, prefix: str = "") -> dict[str, Any]:
    """peft's settings whose names begin so, without that beginning.

    Raises:
        EnvironmentFault: no object of JSON, or alphas that are no numbers.
    """
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise _damaged(f"{where} is no object of JSON")
    settings = {key.removeprefix(prefix): value for key, value in tree.items() if key.startswith(prefix)}
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _damaged(f"alpha_pattern, in {where}, is no object of JSON")
    for alpha in (settings.get("lora_alpha"), *patterns.values()):
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise _damaged(f"an alpha, in {where}, is {alpha!r}, which is no number")
    return settings


def _damaged(what: str) -> EnvironmentFault:
    return EnvironmentFault(what, remedy="fetch the LoRA again, or write it anew with the program that made it")


def find_lora(path: str) -> Path:
    """A LoRA on this machine: a path, an embedded one, or one of the hub, downloaded when it has to be.

    Raises:
        EnvironmentFault: one of the hub that cannot be fetched.
    """
    if (on_hub := hub_lora(path)) is None:
        return Path(lora_place(path)).expanduser()
    try:
        return find_file(on_hub)
    except EnvironmentFault as fault:
        raise EnvironmentFault(
            f"cannot load the LoRA {path}: {fault.message}",
            remedy="give a run folder or a LoRA file (a name like a/b or a/b/file.safetensors is looked up on the hub)",
        ) from fault


def lora_hash(path: str) -> str | None:
    """A digest of the weights behind a run folder, path or hub id; None for what is not on this machine."""
    hashes: list[str] = []
    for one in stack_of(path):
        if (files := _files_of(one.path)) is None:
            return None
        hashes += [file_hash(file) for file in files]
        hashes += [f"{one.scale}"] if not is_plain(path) else []
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _files_of(path: str) -> list[Path] | None:
    """Those that are on this machine, None for none."""
    if (on_hub := hub_lora(path)) is not None:
        found = cached_file(on_hub)
        return None if found is None else [found]
    place = Path(lora_place(path)).expanduser()
    if not place.exists():
        return None
    # the strength of peft's is in a file of its own
    settings = [source.file.with_name("adapter_config.json") for source in sources_of(place) if source.config]
    return [*(source.file for source in sources_of(place)), *settings]


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


def published(component: str, module: str) -> str:
    """The name in published files: newer transformers drop the level ``text_model`` of CLIPTextModel."""
    bare = component in DENOISERS or module.startswith(("text_model.", "text_projection"))
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
    own = config.get("lora_alpha")
    alpha = float(patterns.get(get_pattern_key(patterns, module), rank if own is None else own))
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
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    )
    return config.to_dict() | {"target_modules": sorted(names.values())}


def peft_norms(layer: LoraLayer) -> Tensor:
    """DoRA's norms as peft has them: a convolution's in the shape of its outputs."""
    assert layer.magnitude is not None
    shape = (-1,) if layer.down.dim() == 2 else (1, -1, *[1] * (layer.down.dim() - 2))
    return layer.magnitude.reshape(shape).contiguous()


def write_diffusers(layers: Layers, path: Path) -> None:
    """Write one file that ``pipeline.load_lora_weights`` reads, alpha of every layer included."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, modules in layers.items():
        # the loaders look for one spelling per part, and drop layers of a file with two
        down, up = (
            ("lora_A", "lora_B") if component in DENOISERS else ("lora_linear_layer.down", "lora_linear_layer.up")
        )
        for module, layer in modules.items():
            tensors[f"{component}.{module}.{down}.weight"] = layer.down.contiguous()
            tensors[f"{component}.{module}.{up}.weight"] = layer.up.contiguous()
            if layer.magnitude is not None:
                tensors[f"{component}.{module}.lora_magnitude_vector"] = peft_norms(layer)
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
            if layer.magnitude is not None:
                raise EnvironmentFault(
                    f"{component}.{module} is DoRA, which is written in no format but diffusers' and merged",
                    remedy="use --format diffusers or merged",
                )
            try:
                name = kohya_names(component, module, family=family, layers_per_block=layers_per_block)[0]
            except KeyError as fault:
                raise EnvironmentFault(
                    f"no kohya name for {component}.{module} of a {family} model", remedy="use --format peft"
                ) from fault
            state |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
            state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state
