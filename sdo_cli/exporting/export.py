"""What `sdo export` does: read a LoRA, write it for another program."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from sdo_cli.device import dtype_of
from sdo_cli.embedded import is_embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.exporting.checkpoint import checkpoint_of
from sdo_cli.exporting.kohya import base_version, guess_family, kohya_metadata
from sdo_cli.files import write_atomic
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource, load_family, source_of
from sdo_cli.models.lora_carried import weighted_dora
from sdo_cli.models.lora_files import (
    Layers,
    adapter_settings,
    in_this_transformers,
    kohya_tensors,
    peft_norms,
)
from sdo_cli.models.lora_paths import at_checkpoint, lora_place
from sdo_cli.models.lora_read import read_diffusers
from sdo_cli.models.lora_stack import is_plain
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.runs.again import check_places, load_run
from sdo_cli.runs.read import manifest_of, recipe_of, run_of


@dataclass(frozen=True)
class ExportJob:
    """Attributes:
    source: run folder or LoRA file.
    model: the base model; None takes the run's own.
    family: ``sd``, ``sdxl``, ``sd3``; None finds it out.
    scale: of a merged LoRA.
    precision: of the tensors written: ``no`` (fp32), ``fp16``, ``bf16``.
    """

    source: Path
    model: ModelSource | None
    family: str | None
    scale: float
    precision: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's, empty beside a bare file."""
        run = run_of(lora_place(str(self.source)))
        return manifest_of(run) if run is not None else {}

    def of_run(self) -> LoadedRecipe | None:
        """The recipe in the run's folder; None where another model was given, and for a bare file."""
        run = run_of(lora_place(str(self.source))) if self.model is None else None
        return load_run(run, checked=False) if run is not None and recipe_of(run) is not None else None

    def base(self) -> ModelSource:
        """The model the LoRA belongs to, its place as the run's resolved recipe has it.

        Raises:
            EnvironmentFault: a bare file, and no model was given.
        """
        if self.model is not None:
            return self.model
        if (own := self.of_run()) is not None:
            return source_of(own.recipe)
        if self.manifest:
            names = [field.name for field in fields(ModelSource)]
            return ModelSource(**{name: self.manifest[name] for name in names if name in self.manifest})
        raise EnvironmentFault(f"{self.source} does not say for which model it is", remedy="give it with --model")

    def family_of(self, layers: Layers) -> str:
        family = self.family or self.manifest.get("family") or guess_family(layers)
        if family is None:
            raise EnvironmentFault(
                f"cannot tell the family of {self.source} from its layers", remedy="give --family sd, sdxl or sd3"
            )
        return family


# a share of the LoRA's effect
SAID_FROM = 0.005


def to_kohya(job: ExportJob, out: Path) -> str:
    """One ``.safetensors`` with kohya's names and true alphas."""
    from safetensors.torch import save_file

    layers, lost = _rounded(read_diffusers(job.source), job)
    family = job.family_of(layers)
    said = job.base().prediction_type if job.model or job.manifest else None
    predicts = said or _config(job, "scheduler", "scheduler_config.json").get("prediction_type")
    # two in every published SDXL; another number only where a local model says so
    each = _config(job, "unet", "config.json").get("layers_per_block", 2)
    state = kohya_tensors(layers, family=family, layers_per_block=each)
    state = {key: value.contiguous() for key, value in state.items()}
    # as it was named: the file travels
    model = job.model.model if job.model else job.manifest.get("model", "")
    version = base_version(layers, family, v_prediction=predicts == "v_prediction")
    metadata = kohya_metadata(layers, version, model=model, title=out.stem)
    write_atomic(out, lambda path: save_file(state, path, metadata=metadata))
    return lost


def kohya_writer(model: ModelSource, title: str) -> Callable[[Path], None]:
    """Writes ``<title>-kohya.safetensors`` beside the LoRA that lies in a folder."""

    def write(folder: Path) -> None:
        to_kohya(ExportJob(folder, model, None, 1.0, "no"), folder / f"{title}-kohya.safetensors")

    return write


def _rounded(layers: Layers, job: ExportJob) -> tuple[Layers, str]:
    """The matrices in the precision asked for, and what is to be said of it.

    Raises:
        EnvironmentFault: numbers beyond its range.
    """
    dtype, gap, whole = dtype_of(job.precision), 0.0, 0.0
    found: Layers = {}
    for component, modules in layers.items():
        for module, layer in modules.items():
            now = replace(layer, down=layer.down.to(dtype), up=layer.up.to(dtype))
            if not all(bool(torch.isfinite(half).all()) for half in (now.down, now.up)):
                raise _too_large(f"{component}.{module}", job)
            if dtype != torch.float32:
                before = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
                gap += float((now.up.double().flatten(1) @ now.down.double().flatten(1) - before).square().sum())
                whole += float(before.square().sum())
            found.setdefault(component, {})[module] = now
    share = (gap / whole) ** 0.5 if whole else 0.0
    return found, _lost_said(share, job) if share > SAID_FROM else ""


def _lost_said(share: float, job: ExportJob) -> str:
    return f"{job.precision} rounds away {share:.1%} of what the LoRA adds; --precision no does not"


def _too_large(what: str, job: ExportJob) -> EnvironmentFault:
    return EnvironmentFault(
        f"{what} holds numbers that {'fp32' if job.precision == 'no' else job.precision} cannot hold",
        remedy="use --precision no or bf16, or a smaller --lora-scale; nothing was written",
    )


def _config(job: ExportJob, part: str, name: str) -> dict[str, Any]:
    """A config of the base model, empty unless that is a local folder."""
    if job.model is None and not job.manifest:
        return {}
    path = Path(job.base().model).expanduser() / part / name
    return json.loads(path.read_text()) if path.is_file() else {}


def to_peft(job: ExportJob, out: Path) -> str:
    """A folder per component as ``peft.PeftModel.from_pretrained`` reads it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers, lost = _rounded(read_diffusers(job.source), job)
    family = job.family_of(layers)

    def write(folder: Path) -> None:
        for component, modules in layers.items():
            state = {}
            for module, layer in modules.items():
                name = in_this_transformers(component, module, family=family)
                state[f"base_model.model.{name}.lora_A.weight"] = layer.down.contiguous()
                state[f"base_model.model.{name}.lora_B.weight"] = layer.up.contiguous()
                if layer.magnitude is not None:
                    state[f"base_model.model.{name}.lora_magnitude_vector"] = peft_norms(layer)
            place = folder / component
            place.mkdir(parents=True)
            save_file(state, place / "adapter_model.safetensors", metadata={"format": "pt"})
            LoraConfig(**adapter_settings(modules)).save_pretrained(place)

    _write_folder(out, write)
    return lost


def to_diffusers(job: ExportJob, out: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with its metadata, from any LoRA diffusers can read."""
    if not is_plain(str(job.source)):
        raise EnvironmentFault(f"{job.source} is several LoRAs, or one at another weight", remedy="use --format merged")
    if job.precision != "no":
        raise EnvironmentFault(
            f"--format diffusers is written in fp32, not {job.precision}", remedy="leave --precision out"
        )
    family = _load(job, adapter="default")
    _write_folder(out, family.save_lora)


def to_merged(job: ExportJob, out: Path) -> str:
    """A whole pipeline with the LoRA added to its weights."""
    family, lost = _merge(job)
    _write_folder(out, family.save_pipeline)
    return lost


def to_checkpoint(job: ExportJob, out: Path) -> str:
    """The same as one file in the original names."""
    from safetensors.torch import save_file

    if is_embedded(job.base().model):
        raise EnvironmentFault(
            "the embedded model has sizes of its own, which no program expects of a checkpoint file",
            remedy="use --format merged",
        )
    family, lost = _merge(job)
    state = checkpoint_of(family.pipeline, family.name)
    write_atomic(out, lambda path: save_file(state, path, metadata={"format": "pt"}))
    return lost


def _merge(job: ExportJob) -> tuple[Family, str]:
    """The base model with the LoRA added to its weights, and what is to be said of its rounding."""
    family = _load(job, adapter="lora")
    if job.scale != 1 and any(module.lora_magnitude_vector for _, module in _adapted(family)):
        raise weighted_dora(str(job.source), job.scale)
    base = {name: module.get_base_layer().weight.detach().clone() for name, module in _adapted(family)}
    family.pipeline.fuse_lora(lora_scale=job.scale)
    family.pipeline.unload_lora_weights()
    dtype = dtype_of(job.precision)
    lost = _lost(base, family, dtype)
    for component, part in (("denoiser", family.denoiser), *family.text_encoders.items()):
        for name, value in part.named_parameters():
            if not bool(torch.isfinite(value.to(dtype)).all()):
                raise _too_large(f"{component}.{name}", job)
    family.pipeline.to(dtype)
    return family, _lost_said(lost, job) if lost else ""


def _adapted(family: Family) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter, by component and name."""
    from peft.tuners.lora import LoraLayer

    for component, part in (("denoiser", family.denoiser), *family.text_encoders.items()):
        for name, module in part.named_modules():
            if isinstance(module, LoraLayer):
                yield f"{component}.{name}", module


def _lost(base: dict[str, torch.Tensor], family: Family, dtype: torch.dtype) -> float | None:
    """How far merged weights are from their rounding, as a share of what was added to them; None in full precision."""
    if dtype == torch.float32:
        return None
    parts, gap, added = {"denoiser": family.denoiser, **family.text_encoders}, 0.0, 0.0
    for key, before in base.items():
        component, _, name = key.partition(".")
        now = parts[component].get_submodule(name).weight.detach()
        gap += float((now.to(dtype).float() - now).double().square().sum())
        added += float((now - before).double().square().sum())
    return (gap / added) ** 0.5 if added else None


def _load(job: ExportJob, *, adapter: str) -> Family:
    if (own := job.of_run()) is not None:
        check_places(own.recipe, own.folder, how="give another place by hand, as --model PLACE", for_training=False)
    family = load_family(job.base(), dtype=torch.float32)
    family.load_lora(str(job.source), adapter=adapter)
    return family


def _write_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Fill a neighbouring folder, then rename it: nothing half-written ever has the name."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


FORMATS: dict[str, Callable[[ExportJob, Path], str | None]] = {
    "kohya": to_kohya,
    "peft": to_peft,
    "diffusers": to_diffusers,
    "merged": to_merged,
    "checkpoint": to_checkpoint,
}


def export(job: ExportJob, form: str, out: Path) -> str:
    """Write ``job`` as ``form`` (a key of FORMATS) to ``out``, a file for those of FILES, else a folder.

    Returns:
        What is to be said of it, mostly nothing.
    """
    return FORMATS[form](replace(job, source=job.source.expanduser()), out) or ""


# formats that are one file
FILES = ("kohya", "checkpoint")


def default_out(source: Path, form: str) -> Path:
    """Beside the run folder's file: ``<run>/<run>-kohya.safetensors``, or a folder ``<run>/<form>``.

    Of a checkpoint of it: ``<run>/<run>-20-kohya.safetensors``, ``<run>/<run>-20-<form>``.
    """
    if (found := at_checkpoint(str(source))) is not None:
        stem = f"{found[0].resolve().name}-{found[1]}-{form}"
        return found[0] / (f"{stem}.safetensors" if form in FILES else stem)
    folder = source if source.is_dir() else source.parent
    stem = source.resolve().name if source.is_dir() else source.stem
    return folder / (f"{stem}-{form}.safetensors" if form in FILES else form)
