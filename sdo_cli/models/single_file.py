"""Checkpoints in one ``.safetensors`` file with the original names, as A1111 and ComfyUI use them.

diffusers converts the names; the configs it would fetch ship here (``configs/<kind>``), CLIP's vocabulary comes from
open_clip. Which file is what is read from its header, by the rules of diffusers' ``infer_diffusers_model_type`` and
ComfyUI's ``supported_models.py``.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models import clip_vocabulary

if TYPE_CHECKING:
    import torch

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("sd15", "sd21", "sd21-base", "sdxl", "sd3-medium", "sd35-medium", "sd35-large")
# one name of each kind's own parts
NET = "model.diffusion_model."
UNET, MMDIT = f"{NET}input_blocks.0.0.weight", f"{NET}joint_blocks.0.x_block.attn.qkv.weight"
# every cross attention reads text of one width: which text encoders a UNet was trained with
CROSS = ".1.transformer_blocks.0.attn2.to_k.weight"
WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
# spread in the published v models of SD 2.x and not in the ε ones: ComfyUI tells them apart by it
V_SIGN = f"{NET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
# relatives that would load, and draw noise
OTHERS = {
    "edm_mean": "Playground 2.5, which follows another noise schedule",
    "edm_vpred.sigma_max": "a relative of CosXL, which follows another noise schedule",
    "noise_augmentor.": "an unCLIP model, which starts from images",
}
ENCODERS = "first text encoder", "second text encoder"
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd15": {"text encoder": ("cond_stage_model.",)},
    "sd21": {"text encoder": ("cond_stage_model.", "conditioner.embedders.0.")},
    "sdxl": {name: (f"conditioner.embedders.{place}.",) for place, name in enumerate(ENCODERS)},
    "sd3": {name: (f"text_encoders.{which}.",) for which, name in zip(("clip_l", "clip_g"), ENCODERS, strict=True)},
}
VAE, T5 = ("first_stage_model.", "vae."), "text_encoders.t5xxl."

log = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


def is_single_file(model: str) -> bool:
    """Whether ``model`` is a file rather than a folder or hub id."""
    return Path(model).expanduser().is_file()


def kind_of(path: Path, prediction_type: str | None = None) -> str:
    """Which of ``KINDS`` a checkpoint is, by the names and shapes in its header.

    Args:
        prediction_type: of SD 2.x, where base (ε) and 768 (v) have the same layers. Without it the spread of one bias
            decides, as in ComfyUI.

    Raises:
        EnvironmentFault: no safetensors, a LoRA, an inpainting model, or nothing known.
    """
    shapes = _shapes(path)
    if MMDIT in shapes:
        return _mmdit_kind(shapes)
    if UNET not in shapes:
        raise _no_checkpoint(path, shapes)
    if shapes[UNET][1] != 4:
        raise EnvironmentFault(
            f"{path} is an inpainting or edit model ({shapes[UNET][1]} input channels)", remedy="use the base model"
        )
    if (other := _relative(shapes)) is not None:
        raise EnvironmentFault(f"{path} is {other}", remedy="use an SD 1.x, 2.x, SDXL base or SD 3 checkpoint")
    kind = WIDTHS[_text_width(shapes)]
    if kind != "sd21":
        return kind
    is_v = _spreads(path, shapes) if prediction_type is None else prediction_type == "v_prediction"
    return "sd21" if is_v else "sd21-base"


def _mmdit_kind(shapes: Shapes) -> str:
    if MMDIT.replace("blocks.0.", "blocks.37.") in shapes:
        return "sd35-large"
    return "sd35-medium" if MMDIT.replace("attn.", "attn2.") in shapes else "sd3-medium"


def _no_checkpoint(path: Path, shapes: Shapes) -> EnvironmentFault:
    if any("lora" in name for name in shapes):
        return EnvironmentFault(f"{path} is a LoRA", remedy="give it with --lora (or lora.start_from) beside its model")
    return EnvironmentFault(f"{path} is no Stable Diffusion checkpoint sdo knows", remedy="give a diffusers folder")


def _relative(shapes: Shapes) -> str | None:
    """What else a UNet of four channels belongs to; None for the kinds sdo serves."""
    for prefix, what in OTHERS.items():
        if any(name.startswith(prefix) for name in shapes):
            return what
    if _text_width(shapes) == 1280:
        return "SDXL's refiner, which finishes other models' images"
    return None if _text_width(shapes) in WIDTHS else "of a kind sdo does not know"


def _text_width(shapes: Shapes) -> int:
    return next((shape[-1] for name, shape in shapes.items() if name.startswith(NET) and name.endswith(CROSS)), 0)


def _spreads(path: Path, shapes: Shapes) -> bool:
    from safetensors import safe_open

    if V_SIGN not in shapes:
        return True
    with safe_open(path, "pt") as stream:
        return bool(stream.get_tensor(V_SIGN).float().std(correction=0) > 0.09)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise EnvironmentFault(
            f"{path} is no .safetensors file", remedy="convert it first: a .ckpt is a pickle, which can run any code"
        )
    try:
        with safe_open(path, "pt") as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise EnvironmentFault(f"{path} is no safetensors file, or was cut short", remedy="copy it again") from fault


def config_folder(kind: str) -> Path:
    """The configs of ``kind`` with their tokenizers, in diffusers' layout; made once in the user's cache.

    Raises:
        EnvironmentFault: the cache cannot be written.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdo" / f"configs-{_fingerprint()}"
    folder = base / kind
    if (folder / "model_index.json").is_file():
        return folder
    try:
        _make_folder(folder, kind)
    except OSError as fault:
        raise EnvironmentFault(
            f"cannot write configs to {base}: {fault.strerror}", remedy="set XDG_CACHE_HOME to a folder of yours"
        ) from fault
    return folder


def _make_folder(folder: Path, kind: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=folder.parent))
    try:
        shutil.copytree(CONFIGS / kind, partial, dirs_exist_ok=True)
        index = json.loads((partial / "model_index.json").read_text())
        for name in ("tokenizer", "tokenizer_2"):
            if index.get(name):
                # OpenCLIP's encoders were trained with another padding than OpenAI's
                is_open = name == "tokenizer_2" or kind.startswith("sd21")
                clip_vocabulary.write_clip_tokenizer(partial / name, pad_token="!" if is_open else clip_vocabulary.END)
        partial.rename(folder)
    except OSError:
        # unless another process was first
        if not (folder / "model_index.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fingerprint() -> str:
    """Of everything a config folder is made from: another version of sdo makes its own."""
    made_from = [*sorted(CONFIGS.rglob("*.json")), Path(clip_vocabulary.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in made_from)).hexdigest()[:8]


def load_single_file(
    path: Path,
    *,
    dtype: "torch.dtype",
    prediction_type: str | None = None,
    config: Path | None = None,
    vae: Any = None,
) -> Any:
    """A diffusers pipeline of a single-file checkpoint; SD 3 without its T5.

    Args:
        config: a pipeline folder to take the configs from, instead of those that ship.
        vae: used in place of the file's own, which may then be missing.

    Raises:
        EnvironmentFault: not a checkpoint sdo knows, or one without its text encoders or VAE.
    """
    kind = kind_of(path, prediction_type) if config is None else config.name
    folder, shapes = config or config_folder(kind), _shapes(path)
    if config is None:
        _need_parts(path, kind, shapes, has_vae=vae is not None)
    if any(name.startswith(T5) for name in shapes):
        log.warning("%s: its T5 is left out; a diffusers folder brings it", path.name)
    pipeline = _convert(path, kind, folder, dtype=dtype, given={} if vae is None else {"vae": vae})
    if "v_pred" in shapes:
        # how v models of SDXL are marked; ztsnr: noise to the very end
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in shapes}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    return pipeline


def _need_parts(path: Path, kind: str, shapes: Shapes, *, has_vae: bool) -> None:
    wanted = next(parts for start, parts in PARTS.items() if kind.startswith(start))
    wanted = wanted if has_vae else {"VAE": VAE} | wanted
    missing = [what for what, start in wanted.items() if not any(name.startswith(start) for name in shapes)]
    if missing:
        remedy = "take a file that holds them (sd3_medium_incl_clips.safetensors does), or a diffusers folder"
        raise EnvironmentFault(f"{path} is {kind} without {' and '.join(missing)}", remedy=remedy)


def _convert(path: Path, kind: str, folder: Path, *, dtype: "torch.dtype", given: dict[str, Any]) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    index = json.loads((folder / "model_index.json").read_text())
    left_out = {"text_encoder_3", "tokenizer_3", "safety_checker"} & index.keys()
    options = dict.fromkeys(left_out) | given
    cls = getattr(diffusers, index["_class_name"])
    try:
        pipeline = cls.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **options
        )
    except (SingleFileComponentError, LookupError, ValueError, RuntimeError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise _other_layers(path, kind, reason) from fault
    # a part of which the file holds too little keeps layers without values
    nets = {name: part for name, part in pipeline.components.items() if hasattr(part, "named_parameters")}
    empty = [f"{name}.{key}" for name, net in nets.items() for key, value in net.named_parameters() if value.is_meta]
    if empty:
        raise _other_layers(path, kind, f"no {empty[0]}")
    return pipeline


def _other_layers(path: Path, kind: str, reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{path} looks like {kind}, but its layers are others: {reason}", remedy="give a diffusers folder of it"
    )
