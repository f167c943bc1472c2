"""From a name to a model family."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import sdo
from sdo_cli.models.folder import UNUSED, what_is_missing
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.scheduler_config import said, saying

if TYPE_CHECKING:
    import torch

    from sdo_cli.models.base import Family

# pipeline class in model_index.json -> family
PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
# keys of a recipe that stand in a scheduler's config
SCHEDULER_KEYS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
# what a folder's weights may be called, by variant
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class ModelSource:
    """Which weights to load.

    Attributes:
        model: ``embedded``, a diffusers folder, a single ``.safetensors`` file, or a hub id.
        revision: of a hub id.
        variant: ``fp16`` loads files named so; found out for folders that hold nothing else.
        vae: folder or hub id of another VAE, for example the repaired fp16 one of SDXL.
        text_encoders: folder of a pipeline whose text encoders a single file takes, for want of its own.
        t5: False leaves the third text encoder of SD 3 out.
        prediction_type: ``epsilon`` or ``v_prediction`` where the model's scheduler config does not say, or lies.
        rescale_betas_zero_snr, timestep_spacing: likewise.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    text_encoders: str | None = None
    t5: bool = True
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: str | None = None

    def scheduler_changes(self) -> dict[str, Any]:
        """What is said of the model in place of its scheduler config."""
        return {key: value for key in SCHEDULER_KEYS if (value := getattr(self, key)) is not None}


def source_of(recipe: Recipe) -> ModelSource:
    """The model a recipe names."""
    return ModelSource(**{field.name: getattr(recipe, field.name) for field in fields(ModelSource)})


def locate(model: str) -> str:
    """Folder, file or hub id behind ``model``.

    Raises:
        EnvironmentFault: a path that holds no model.
    """
    if embedded.is_embedded(model):
        try:
            path = embedded.folder(model, default="emoji")
        except KeyError as fault:
            raise EnvironmentFault(str(fault.args[0]), remedy="write `embedded`") from fault
    else:
        path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise EnvironmentFault(
                f"{model} is a folder without model_index.json", remedy="give the folder of a diffusers pipeline"
            )
        return str(path)
    if path.is_file():
        return str(path)
    if model.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".ckpt") or model.count("/") != 1:
        raise EnvironmentFault(
            f"no model at {model}",
            remedy="give `embedded`, the folder of a diffusers pipeline, a .safetensors checkpoint, or a hub id",
        )
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Loading takes a second; sdo shows its own progress, and names of arguments are sdo's business."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in libraries:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # names of arguments that newer versions want otherwise
            warnings.filterwarnings("ignore", message=".*(torch_dtype|local_dir_use_symlinks).*")
            yield
    finally:
        for module in libraries:
            module.enable_progress_bar()


def load_family(source: ModelSource | str, *, dtype: "torch.dtype | None" = None) -> "Family":
    """Load every part on the CPU.

    Args:
        dtype: of the weights in memory, float32 by default.

    Raises:
        EnvironmentFault: not found, not reachable, or a pipeline no family serves.
    """
    import torch

    wanted = ModelSource(source) if isinstance(source, str) else source
    with _sentences(wanted.model), _quietly():
        pipeline = _load_pipeline(wanted, dtype or torch.float32)
    family = family_of(pipeline, wanted.model)
    family.notes = settle_scheduler(family, wanted)
    return family


def settle_scheduler(family: "Family", source: ModelSource) -> tuple[str, ...]:
    """Put what a checkpoint file, and before it the recipe, says in place of the family's scheduler config.

    Returns:
        A sentence for everything that is said in two ways, or not at all.
    """
    from sdo_cli.models.file_header import read_header
    from sdo_cli.models.single_file import is_single_file, kind_of

    place, changes, notes = locate(source.model), source.scheduler_changes(), []
    model_says, who = said(family.scheduler_config), "the model's scheduler config"
    if is_single_file(place):
        header, who = read_header(Path(place)), "the file"
        model_says, notes = header.scheduler_settings(), header.contradictions()
        if not {**model_says, **changes}.get("prediction_type") and kind_of(Path(place)) == "sd21":
            notes.append(
                "SD 2.x in one file that does not say what it predicts: taken for v_prediction, as 768-pixel models do;"
                " for a base model write prediction_type: epsilon"
            )
        family.use_scheduler_config(saying(family.scheduler_config, **model_says))
    notes += [
        f"{key}: {value}, where {who} says {model_says[key]}"
        for key, value in changes.items()
        # spacing is the user's to choose
        if key != "timestep_spacing" and model_says.get(key, value) != value
    ]
    family.use_scheduler_config(saying(family.scheduler_config, **changes))
    return tuple(notes)


def family_of(pipeline: Any, source: str) -> "Family":
    """The family that serves a loaded diffusers pipeline.

    Raises:
        EnvironmentFault: none does.
    """
    from sdo_cli.models.sd import StableDiffusion
    from sdo_cli.models.sd3 import StableDiffusion3
    from sdo_cli.models.sdxl import StableDiffusionXL

    classes = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}
    kind = type(pipeline).__name__
    network = getattr(pipeline, classes[_family_name(kind, source)].denoiser_name)
    takes, makes = network.config.in_channels, pipeline.vae.config.latent_channels
    if takes != makes:
        raise EnvironmentFault(
            f"{source} is an inpainting or edit model: its network takes {takes} channels, and pictures have {makes}",
            remedy="use the base model",
        )
    return classes[_family_name(kind, source)](pipeline, source)


def _family_name(kind: Any, source: str) -> str:
    if kind not in PIPELINES:
        raise EnvironmentFault(
            f"{source} is a {kind}, which no model family serves yet",
            remedy=f"use a model of one of: {', '.join(PIPELINES)}",
        )
    return PIPELINES[kind]


@contextmanager
def _sentences(model: str) -> Iterator[None]:
    """What the libraries say when weights are missing, as one sentence."""
    try:
        yield
    except (OSError, ValueError) as fault:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise EnvironmentFault(
            f"cannot load {model}{offline}: {str(fault).strip().splitlines()[0]}",
            remedy=f"get the files with `{sdo('fetch', 'RECIPE')}` on a machine with network, or try `model=embedded`",
        ) from fault


def _load_pipeline(wanted: ModelSource, dtype: "torch.dtype") -> Any:
    import diffusers

    from sdo_cli.models.single_file import is_single_file, load_single_file

    place = locate(wanted.model)
    vae = {} if wanted.vae is None else {"vae": _load_vae(wanted.vae, dtype)}
    if is_single_file(place):
        text = {} if wanted.text_encoders is None else _load_text(wanted.text_encoders, dtype, t5=wanted.t5)
        return load_single_file(Path(place), dtype=dtype, prediction_type=wanted.prediction_type, parts=vae | text)
    if wanted.text_encoders is not None:
        raise EnvironmentFault(
            f"text_encoders: {wanted.model} has its own", remedy="leave it out: it is for checkpoint files without"
        )
    index = _index(place, wanted.revision)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    _family_name(kind, wanted.model)
    options: dict[str, Any] = dict(vae)
    # sdo has no use for them and fetches none
    options |= {name: None for name in UNUSED if name in index}
    if "safety_checker" in index:
        options["requires_safety_checker"] = False
    options |= _choices(wanted, place, index)
    if Path(place).is_dir():
        others = {name: value for name, value in index.items() if name not in vae}
        t5 = "text_encoder_3" not in options
        if problem := what_is_missing(Path(place), others, options.get("variant"), t5=t5):
            raise EnvironmentFault(problem[0], remedy=problem[1])
    return getattr(diffusers, str(kind)).from_pretrained(place, torch_dtype=dtype, use_safetensors=True, **options)


def plain_options(wanted: ModelSource) -> dict[str, Any]:
    """What else plain ``from_pretrained`` must be told to load this model, its VAE apart; nothing for a single file."""
    place = locate(wanted.model)
    if Path(place).is_file():
        return {}
    return _choices(wanted, place, _index(place, wanted.revision))


def _choices(wanted: ModelSource, place: str, index: Any) -> dict[str, Any]:
    choices: dict[str, Any] = {"revision": wanted.revision, "variant": wanted.variant or _only_variant(place)}
    choices = {name: value for name, value in choices.items() if value is not None}
    no_third = not wanted.t5 or not (index.get("text_encoder_3") or [None])[0]
    if PIPELINES[index["_class_name"]] == "sd3" and no_third:
        choices |= {"text_encoder_3": None, "tokenizer_3": None}
    return choices


def _index(place: str, revision: str | None) -> Any:
    """The content of ``model_index.json``."""
    from diffusers import DiffusionPipeline

    if Path(place).is_dir():
        return json.loads((Path(place) / "model_index.json").read_text())
    return DiffusionPipeline.load_config(place, revision=revision)


def _only_variant(place: str) -> str | None:
    """``fp16`` for a folder that holds only files of that name, as people copy them to save space."""
    for name in DENOISERS:
        found = [path.name for path in (Path(place) / name).glob("*.safetensors")]
        if found and all(re.search(r"\.fp16[.-]", file) for file in found):
            return "fp16"
    return None


def text_parts(folder: str, *, t5: bool) -> dict[str, str]:
    """The text encoders and tokenizers of a pipeline's folder, each with its class in transformers.

    Raises:
        EnvironmentFault: no such folder, or one without any.
    """
    path = Path(folder).expanduser()
    if not (path / "model_index.json").is_file():
        raise EnvironmentFault(
            f"text_encoders: {folder} is no folder of a diffusers pipeline",
            remedy="give one of the same kind of model, with model_index.json",
        )
    index = json.loads((path / "model_index.json").read_text())
    found = {
        name: str(value[1])
        for name, value in index.items()
        if name.startswith(("text_encoder", "tokenizer")) and value[0] and (t5 or not name.endswith("_3"))
    }
    if "text_encoder" not in found:
        raise EnvironmentFault(f"text_encoders: {folder} has none", remedy="give another pipeline")
    if problem := what_is_missing(path, {name: index[name] for name in found}, _only_variant(folder), t5=t5):
        raise EnvironmentFault(problem[0], remedy=problem[1])
    return found


def _load_text(folder: str, dtype: "torch.dtype", *, t5: bool) -> dict[str, Any]:
    import transformers

    path, found = Path(folder).expanduser(), {}
    for name, kind in text_parts(folder, t5=t5).items():
        options = {"torch_dtype": dtype} if name.startswith("text_encoder") else {}
        found[name] = getattr(transformers, kind).from_pretrained(path, subfolder=name, **options)
    return found


def _load_vae(vae: str, dtype: "torch.dtype") -> Any:
    from diffusers import AutoencoderKL

    path = Path(vae).expanduser()
    if path.is_file():
        raise EnvironmentFault(
            f"vae {vae} is a file", remedy="give the folder of a diffusers AutoencoderKL, or a hub id"
        )
    if path.is_dir():
        file = path / "config.json"
        kind = json.loads(file.read_text()).get("_class_name") if file.is_file() else "no model"
        if kind != "AutoencoderKL":
            raise EnvironmentFault(
                f"vae {vae} is {'an ' if kind != 'no model' else ''}{kind}, not an AutoencoderKL",
                remedy="give the folder of a diffusers AutoencoderKL (often the folder vae inside a pipeline)",
            )
    return AutoencoderKL.from_pretrained(str(path) if path.is_dir() else vae, torch_dtype=dtype)
