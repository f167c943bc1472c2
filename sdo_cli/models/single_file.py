"""Checkpoints in one ``.safetensors`` file with the original names, as A1111 and ComfyUI use them.

diffusers converts the names; the configs it would fetch ship here (``configs/<kind>``), CLIP's vocabulary comes from
open_clip.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.clip_vocabulary import END, write_clip_tokenizer
from sdo_cli.models.file_header import Header, read_header

if TYPE_CHECKING:
    import torch

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("sd15", "sd21", "sd21-base", "sdxl", "sd3-medium", "sd35-medium", "sd35-large")
# one name of each kind's own parts
UNET, MMDIT = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
)
# SDXL's size and pooled text
LABEL = "model.diffusion_model.label_emb.0.0.weight"
BASE = "use the base model"
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def is_single_file(model: str) -> bool:
    """Whether ``model`` is a file rather than a folder or hub id."""
    return Path(model).expanduser().is_file()


def kind_of(path: Path, prediction_type: str | None = None) -> str:
    """Which of ``KINDS`` a checkpoint is, by the names and shapes in its header.

    Args:
        prediction_type: SD 2.x base (ε) and 768 (v) have the same shapes; ``epsilon`` means base, without it the file
            is asked, and the default is v.

    Raises:
        EnvironmentFault: no safetensors, a LoRA, an inpainting model, one whose weights or noise are scaled in another
            way, or nothing known.
    """
    header = read_header(path)
    header.check()
    return _kind(header, prediction_type)


def _kind(header: Header, prediction_type: str | None) -> str:
    shapes, path = header.shapes, header.path
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
        raise EnvironmentFault(f"{path} is an inpainting or edit model ({shapes[UNET][1]} input channels)", remedy=BASE)
    # the refiner reads one text encoder, OpenCLIP's, where SDXL has two and SD 1.5 none of this name
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise EnvironmentFault(f"{path} is SDXL's refiner, which only ends what the base model began", remedy=BASE)
    if LABEL in shapes and CROSS in shapes:
        raise EnvironmentFault(f"{path} is an unCLIP model, which takes a picture's embedding", remedy=BASE)
    if LABEL in shapes or any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "sdxl"
    if CROSS in shapes and shapes[CROSS][-1] == 1024:
        return "sd21-base" if (prediction_type or header.prediction_type) == "epsilon" else "sd21"
    return "sd15"


# parts of a file, by the beginning of their names: diffusers' name, what to give in their place
VAE, TEXT = "first_stage_model.", ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def check_parts(header: Header, *, vae: bool, text: bool) -> None:
    """Raises EnvironmentFault for a file that lacks a part that is not given otherwise.

    Args:
        vae: one is given.
        text: text encoders are given.
    """
    if not vae and not any(name.startswith(VAE) for name in header.shapes):
        raise EnvironmentFault(
            f"{header.path} holds no VAE",
            remedy="give one with vae: the folder of a diffusers AutoencoderKL, or a hub id",
        )
    if not text and not any(name.startswith(TEXT) for name in header.shapes):
        raise EnvironmentFault(
            f"{header.path} holds no text encoders",
            remedy="give them with text_encoders: (--text-encoders), the folder of a diffusers pipeline of its kind",
        )


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
    path: Path,
    *,
    dtype: "torch.dtype",
    prediction_type: str | None = None,
    parts: Mapping[str, Any] = MappingProxyType({}),
    config: Path | None = None,
) -> Any:
    """A diffusers pipeline of a single-file checkpoint; SD 3 without its T5.

    Args:
        parts: by diffusers' name, in place of the file's own or where it has none: VAE, text encoders, tokenizers.
        config: a pipeline folder to take the configs from, instead of those that ship.

    Raises:
        EnvironmentFault: not a checkpoint sdo knows, or one that lacks a part.
    """
    import diffusers

    header = read_header(path)
    folder = config or config_folder(kind_of(path, prediction_type))
    check_parts(header, vae="vae" in parts, text="text_encoder" in parts)
    index = json.loads((folder / "model_index.json").read_text())
    options: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if "text_encoder_3" in index else {}
    if "safety_checker" in index:
        options |= {"safety_checker": None}
    options |= parts
    with _renamed(header):
        try:
            return getattr(diffusers, index["_class_name"]).from_single_file(
                str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **options
            )
        except NotImplementedError as fault:
            # what no tensor of the file filled is still without data
            if "meta tensor" not in str(fault):
                raise
            raise EnvironmentFault(
                f"{path} lacks weights of a model of its kind",
                remedy="fetch the file again; a pruned or distilled model needs a diffusers folder with its own config",
            ) from fault


@contextmanager
def _renamed(header: Header) -> Iterator[None]:
    """Let diffusers read a file whose CLIP lacks a level of names, as NovelAI's and those derived from it do."""
    from diffusers.loaders import single_file

    old, new = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
    wrong = [name for name in header.shapes if name.startswith(old) and not name.startswith(new)]
    if not wrong:
        yield
        return
    read = single_file.load_single_file_checkpoint

    def renamed(*args: Any, **options: Any) -> dict[str, Any]:
        return {new + k.removeprefix(old) if k in wrong else k: v for k, v in read(*args, **options).items()}

    single_file.load_single_file_checkpoint = renamed
    try:
        yield
    finally:
        single_file.load_single_file_checkpoint = read
