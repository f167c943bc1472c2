"""Checkpoints in one ``.safetensors`` file with the original names, as A1111 and ComfyUI use them.

diffusers converts the names; the configs it would fetch ship here (``configs/<kind>``), CLIP's vocabulary comes from
open_clip.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.clip_vocabulary import END, write_clip_tokenizer

if TYPE_CHECKING:
    import torch

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("sd15", "sd21", "sd21-base", "sdxl", "sd3-medium", "sd35-medium", "sd35-large")
# one name of each kind's own parts
UNET, MMDIT = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
)
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def is_single_file(model: str) -> bool:
    """Whether ``model`` is a file rather than a folder or hub id."""
    return Path(model).expanduser().is_file()


def kind_of(path: Path, prediction_type: str | None = None) -> str:
    """Which of ``KINDS`` a checkpoint is, by the names and shapes in its header.

    Args:
        prediction_type: SD 2.x base (ε) and 768 (v) cannot be told apart; ``epsilon`` means base, the default is v.

    Raises:
        EnvironmentFault: no safetensors, a LoRA, an inpainting model, or nothing known.
    """
    shapes = _shapes(path)
    if MMDIT in shapes:
        if "model.diffusion_model.joint_blocks.37.x_block.attn.qkv.weight" in shapes:
            return "sd35-large"
        dual = "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight" in shapes
        return "sd35-medium" if dual else "sd3-medium"
    if UNET not in shapes:
        is_lora = any("lora" in name for name in shapes)
        raise EnvironmentFault(
            f"{path} is {'a LoRA' if is_lora else 'no Stable Diffusion checkpoint sdo knows'}",
            remedy="give it with --lora (or lora.start_from) beside its model"
            if is_lora
            else "give a diffusers folder",
        )
    if shapes[UNET][1] != 4:
        raise EnvironmentFault(
            f"{path} is an inpainting or edit model ({shapes[UNET][1]} input channels)", remedy="use the base model"
        )
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "sdxl"
    if CROSS in shapes and shapes[CROSS][-1] == 1024:
        return "sd21-base" if prediction_type == "epsilon" else "sd21"
    return "sd15"


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
    """The configs of ``kind`` with their tokenizers, in diffusers' layout; made once in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdo" / "configs-1"
    folder = base / kind
    if (folder / "model_index.json").is_file():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=base))
    shutil.copytree(CONFIGS / kind, partial, dirs_exist_ok=True)
    index = json.loads((partial / "model_index.json").read_text())
    for name in ("tokenizer", "tokenizer_2"):
        if index.get(name):
            # OpenCLIP's encoders were trained with another padding than OpenAI's
            is_open = name == "tokenizer_2" or kind.startswith("sd21")
            write_clip_tokenizer(partial / name, pad_token="!" if is_open else END)
    try:
        partial.rename(folder)
    except OSError:
        # another process was first
        shutil.rmtree(partial)
    return folder


def load_single_file(
    path: Path, *, dtype: "torch.dtype", prediction_type: str | None = None, config: Path | None = None
) -> Any:
    """A diffusers pipeline of a single-file checkpoint; SD 3 without its T5.

    Args:
        config: a pipeline folder to take the configs from, instead of those that ship.

    Raises:
        EnvironmentFault: not a checkpoint sdo knows.
    """
    import diffusers

    folder = config or config_folder(kind_of(path, prediction_type))
    index = json.loads((folder / "model_index.json").read_text())
    options: dict[str, Any] = {}
    if "text_encoder_3" in index:
        options = {"text_encoder_3": None, "tokenizer_3": None}
    if "safety_checker" in index:
        options = {"safety_checker": None}
    return getattr(diffusers, index["_class_name"]).from_single_file(
        str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **options
    )
