"""Reward models. ``build("clip")`` makes one; the tables below name them all and import no torch."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from rewards.registered import Foreign
from sdo_cli.hub import WeightFile
from sdo_cli.plugins import REGISTERED, REWARDS, installed_names, load_installed

if TYPE_CHECKING:
    from rewards.base import RewardInfo

# Read by sdo at start-up to tell this package from another one called `rewards`.
BELONGS_TO = "sdo-diffusion"

TABLE: dict[str, str] = {
    "clip-score": "rewards.clip_score",
    "aesthetic-v2": "rewards.aesthetic",
    "hps-v2": "rewards.hps",
    "hps-v2.1": "rewards.hps",
    "pickscore-v1": "rewards.pickscore",
    "imagereward-v1": "rewards.imagereward",
    "cyclereward-combo": "rewards.cyclereward",
    "cyclereward-i2t": "rewards.cyclereward",
    "cyclereward-t2i": "rewards.cyclereward",
    "mps-v1": "rewards.mps",
    "lrm-1.5": "rewards.lrm",
    "lrm-xl": "rewards.lrm",
    "colorfulness": "rewards.colorfulness",
    "jpeg-compressibility": "rewards.jpeg",
    "mixture": "rewards.mixture",
    "judge": "rewards.judge",
    "clip-embedded": "rewards.clip_embedded",
    "aesthetic-embedded": "rewards.aesthetic_embedded",
}
SHORT = {
    "clip": "clip-score",
    "aesthetic": "aesthetic-v2",
    "hps": "hps-v2.1",
    "pickscore": "pickscore-v1",
    "imagereward": "imagereward-v1",
    "cyclereward": "cyclereward-combo",
    "mps": "mps-v1",
}
# Known without importing torch, so that a recipe can be checked in milliseconds.
MEASURE_ONLY = frozenset({"judge", "jpeg-compressibility"})
OPTIONS: dict[str, frozenset[str]] = {
    "clip-score": frozenset({"model", "pretrained", "tag"}),
    "aesthetic-v2": frozenset({"model", "head", "pretrained", "tag"}),
    "hps-v2": frozenset({"model", "checkpoint"}),
    "hps-v2.1": frozenset({"model", "checkpoint"}),
    "pickscore-v1": frozenset({"model"}),
    "imagereward-v1": frozenset({"checkpoint", "config", "tokenizer"}),
    "cyclereward-combo": frozenset({"checkpoint", "config", "tokenizer"}),
    "cyclereward-i2t": frozenset({"checkpoint", "config", "tokenizer"}),
    "cyclereward-t2i": frozenset({"checkpoint", "config", "tokenizer"}),
    "mps-v1": frozenset({"checkpoint", "config", "condition", "threshold"}),
    "lrm-1.5": frozenset({"model", "timestep"}),
    "lrm-xl": frozenset({"model", "timestep"}),
    "colorfulness": frozenset(),
    "jpeg-compressibility": frozenset({"quality"}),
    "mixture": frozenset({"parts", "lower_bound"}),
    "judge": frozenset(),
    "clip-embedded": frozenset(),
    "aesthetic-embedded": frozenset(),
}
# tokens of a prompt that published weights read; a reward that is not here sees the picture alone, a mixture what its
# parts see
READS: dict[str, int] = {
    "clip-score": 77,
    "hps-v2": 77,
    "hps-v2.1": 77,
    "pickscore-v1": 77,
    "imagereward-v1": 35,
    "cyclereward-combo": 128,
    "cyclereward-i2t": 128,
    "cyclereward-t2i": 128,
    "mps-v1": 77,
    "lrm-1.5": 77,
    "lrm-xl": 77,
    "clip-embedded": 20,
    "judge": 20,
}
# they see x_N, and no picture
LATENT = frozenset({"lrm-1.5", "lrm-xl"})
# options without a default
REQUIRED: dict[str, frozenset[str]] = {
    "mixture": frozenset({"parts"}),
    **{name: frozenset({"model"}) for name in LATENT},
}
# options that are no text
TYPES: dict[tuple[str, str], type] = {
    ("mixture", "parts"): list,
    ("mixture", "lower_bound"): float,
    ("jpeg-compressibility", "quality"): int,
    ("mps-v1", "threshold"): float,
    ("lrm-1.5", "timestep"): int,
    ("lrm-xl", "timestep"): int,
}

# sizes are about what was published, not looked up here
OPENAI_CLIP = WeightFile("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", 1_710_000_000, "MIT")
AESTHETIC_HEAD = WeightFile("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", 3_700_000, "Apache-2.0")
HPS = {
    "hps-v2": WeightFile("xswu/HPSv2", "HPS_v2_compressed.pt", 1_970_000_000, "Apache-2.0"),
    "hps-v2.1": WeightFile("xswu/HPSv2", "HPS_v2.1_compressed.pt", 1_970_000_000, "Apache-2.0"),
}
PICKSCORE = (
    WeightFile("yuvalkirstain/PickScore_v1", "config.json", 5_000, "MIT"),
    WeightFile("yuvalkirstain/PickScore_v1", "model.safetensors", 3_940_000_000, "MIT"),
)
BERT = "google-bert/bert-base-uncased"
# BLIP's own settings and words, the same for all who stand on it
BLIP_TEXT_FILES = (
    WeightFile("THUDM/ImageReward", "med_config.json", 500, "Apache-2.0"),
    WeightFile(BERT, "vocab.txt", 230_000, "Apache-2.0"),
)
IMAGEREWARD = (WeightFile("THUDM/ImageReward", "ImageReward.pt", 1_790_000_000, "Apache-2.0"), *BLIP_TEXT_FILES)
CYCLEREWARD = {
    f"cyclereward-{kind.lower()}": WeightFile(
        f"carolineec/CycleReward-{kind}", "model.safetensors", 1_790_000_000, "MIT"
    )
    for kind in ("Combo", "I2T", "T2I")
}
# a converted copy: the authors' file is a pickled module, which is not read (rewards/mps.py)
MPS = WeightFile("RE-N-Y/mpsv1", "model.safetensors", 4_300_000_000, "MIT")


def _blip_needs(checkpoint: WeightFile) -> Mapping[tuple[str, ...], tuple[WeightFile, ...]]:
    settings, words = BLIP_TEXT_FILES
    return {("checkpoint",): (checkpoint,), ("config",): (settings,), ("tokenizer",): (words,)}


# several names of one module
_VERSIONED = frozenset({*HPS, *CYCLEREWARD, *LATENT})
# what a reward needs beside its own options, by the options of which any one replaces it
_CLIP: Mapping[tuple[str, ...], tuple[WeightFile, ...]] = {("model", "pretrained"): (OPENAI_CLIP,)}
_NEEDS: Mapping[str, Mapping[tuple[str, ...], tuple[WeightFile, ...]]] = {
    "clip-score": _CLIP,
    "aesthetic-v2": {**_CLIP, ("head",): (AESTHETIC_HEAD,)},
    "hps-v2": {("checkpoint",): (HPS["hps-v2"],)},
    "hps-v2.1": {("checkpoint",): (HPS["hps-v2.1"],)},
    "pickscore-v1": {("model",): PICKSCORE},
    "imagereward-v1": _blip_needs(IMAGEREWARD[0]),
    **{name: _blip_needs(file) for name, file in CYCLEREWARD.items()},
    "mps-v1": {("checkpoint",): (MPS,)},
}
WEIGHTS: Mapping[str, tuple[WeightFile, ...]] = {
    name: tuple(file for files in needs.values() for file in files) for name, needs in _NEEDS.items()
}
_EMBEDDED = {"clip-score": {"model": "embedded"}, "aesthetic-v2": {"model": "embedded", "head": "embedded"}}
# what their scores are called
TOYS = {"clip-score": "clip-embedded", "aesthetic-v2": "aesthetic-embedded"}


Made = TypeVar("Made")


# registered by plug-ins with @reward
FOREIGN: dict[str, Foreign] = {}


def reward(
    name: str,
    *,
    summary: str,
    source: str = "",
    licence: str = "",
    range: tuple[float, float] = (float("-inf"), float("inf")),
    differentiable: bool = True,
    sees: str = "picture",
) -> Callable[[type[Made]], type[Made]]:
    """Decorator that makes a class a reward recipes can name (docs/plugins.md).

    The class has ``score(images, prompts) -> [B]``; the keyword-only parameters of its ``__init__`` are its options,
    checked by their annotation: str, int, float or bool. One that is not differentiable only measures. One that
    ``sees="latent"`` gets x_N in place of images and has ``latents``, a :class:`rewards.base.LatentSpace`.

    Raises:
        ValueError: the name is taken, an option has another annotation, or it sees something else.
    """

    def register(made: type[Made]) -> type[Made]:
        if name in TABLE or name in SHORT or name in FOREIGN:
            raise ValueError(f"there is a reward {name!r} already; give yours another name")
        if sees not in ("picture", "latent"):
            raise ValueError(f"reward {name!r} sees a picture or a latent, not {sees!r}")
        options = _options_of(name, made)
        REGISTERED.append(name)
        FOREIGN[name] = Foreign(made, summary, source, licence, range, differentiable, sees)
        OPTIONS[name] = frozenset(options)
        REQUIRED[name] = frozenset(o for o in options if parameters(made)[o].default is inspect.Parameter.empty)
        TYPES.update({(name, option): hint for option, hint in options.items()})
        return made

    return register


def parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a reward's class or ``build`` takes."""
    return inspect.signature(make).parameters


def _options_of(name: str, made: type) -> dict[str, type]:
    if made.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    hints, options = get_type_hints(made.__init__), {}  # type: ignore[misc]
    for parameter in parameters(made).values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(f"{parameter.name} of reward {name!r} must be keyword-only: write a * before it")
        if (hint := hints.get(parameter.name)) not in (str, int, float, bool):
            raise ValueError(f"option {parameter.name} of reward {name!r} must be str, int, float or bool")
        options[parameter.name] = hint
    return options


def resolve(name: str) -> bool:
    """Whether there is a reward of this name: built in, registered, or in an installed package, which is loaded."""
    full = full_name(name)
    return full in TABLE or full in FOREIGN or load_installed(REWARDS, full, FOREIGN)


def info(name: str) -> "RewardInfo":
    """What a known reward says about itself; imports its module, and so torch."""
    full = full_name(name)
    if full in FOREIGN:
        from rewards.foreign import info_of

        return info_of(full, FOREIGN[full])
    # one module may make several versions
    return replace(import_module(TABLE[full]).INFO, name=full)


def is_measure_only(name: str) -> bool:
    """Whether no recipe may train on it."""
    full = full_name(name)
    return full in MEASURE_ONLY or (full in FOREIGN and not FOREIGN[full].differentiable)


def sees_latents(name: str) -> bool:
    """Whether a known reward is given x_N and no picture."""
    full = full_name(name)
    return full in LATENT or (full in FOREIGN and FOREIGN[full].sees == "latent")


def full_name(name: str) -> str:
    """``clip`` to ``clip-score``: short names stand for the newest version."""
    return SHORT.get(name, name)


def known_names() -> list[str]:
    foreign = set(FOREIGN) | set(installed_names(REWARDS))
    return sorted(TABLE) + sorted(SHORT) + sorted(foreign - set(TABLE))


def embedded_options(name: str) -> dict[str, Any]:
    """What makes a reward use the embedded models; empty for those that have none."""
    return dict(_EMBEDDED.get(full_name(name), {}))


def with_embedded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the embedded models where none is given; in every part of a mixture too."""
    if full_name(name) == "mixture":
        parts = [{**part, "options": with_embedded(part["name"], given)} for part, given in _parts_of(options)]
        return {**options, "parts": parts}
    return {**({} if "model" in options else embedded_options(name)), **options}


def by_its_name(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Full name and options: a published name whose options ask for the embedded models becomes the toy's own.

    So do the parts of a mixture.
    """
    full = full_name(name)
    if full == "mixture":
        return full, {**options, "parts": [_part_by_its_name(part, given) for part, given in _parts_of(options)]}
    spelt = {key: "embedded" if value == "embedded:clip" else value for key, value in options.items()}
    return (TOYS[full], {}) if full in TOYS and spelt == _EMBEDDED[full] else (full, dict(options))


def _part_by_its_name(part: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    name, kept = by_its_name(part["name"], given)
    return part if name == full_name(part["name"]) else {**part, "name": name, "options": kept}


def _parts_of(options: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A mixture's parts, each with its options."""
    return [(part, part.get("options") or {}) for part in options.get("parts") or []]


def needed_files(name: str, options: Mapping[str, Any]) -> tuple[WeightFile, ...]:
    """Files of the hub a reward needs with these options.

    An option that gives a hub id instead of a path is looked up by the library that reads it, not listed here.
    """
    full = full_name(name)
    if full == "mixture":
        return tuple(file for part, given in _parts_of(options) for file in needed_files(part["name"], given))
    return tuple(
        file
        for replaced_by, files in _NEEDS.get(full, {}).items()
        if all(options.get(option) is None for option in replaced_by)
        for file in files
    )


def missing_paths(name: str, options: Mapping[str, Any]) -> list[str]:
    """Options that name a local file or folder which is not there."""
    if full_name(name) == "mixture":
        return [path for part, given in _parts_of(options) for path in missing_paths(part["name"], given)]
    looks_local = [
        str(value)
        for option, value in options.items()
        if isinstance(value, str) and (value.startswith(("/", "./", "../", "~")) or Path(value).suffix in SUFFIXES)
    ]
    return [value for value in looks_local if not Path(value).expanduser().exists()]


SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".json", ".txt")


def build(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make the reward called ``name``, with its published weights unless options say otherwise.

    Raises:
        KeyError: unknown name.
        EnvironmentFault: weights that are not there.
    """
    full = full_name(name)
    if not resolve(full):
        raise KeyError(f"unknown reward {name!r}; there are {', '.join(known_names())}")
    if full in FOREIGN:
        from rewards.foreign import guarded

        return guarded(full, FOREIGN[full], dict(options or {}))
    module = import_module(TABLE[full])
    versioned = {"version": full} if full in _VERSIONED else {}
    return module.build(**versioned, **(options or {}))
