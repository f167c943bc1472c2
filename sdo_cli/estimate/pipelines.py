"""Pipelines of configs alone: every part on the meta device, tokenizers that know only lengths."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdo_cli.errors import EnvironmentFault
from sdo_cli.estimate.cost import META
from sdo_cli.hub import WeightFile, cached_file
from sdo_cli.models.base import Family
from sdo_cli.models.catalog import MODELS
from sdo_cli.models.file_header import read_header
from sdo_cli.models.load import ModelSource, family_of, locate, settle_scheduler
from sdo_cli.models.single_file import CONFIGS, check_parts, is_single_file, kind_of

# T5 v1.1 XXL, the third text encoder of SD 3 (config.json of the published repositories)
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
# they compute in fp16, where the original VAE of SDXL overflows
NO_UPCAST = ("madebyollin/sdxl-vae-fp16-fix",)


class Lengths:
    """A tokenizer for which only the number of tokens matters; ``encoder`` is what reads them."""

    def __init__(self, encoder: Any) -> None:
        self.model_max_length: int = getattr(getattr(encoder, "config", None), "max_position_embeddings", 0)
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, prompt: str) -> list[str]:
        del prompt
        return []

    def __call__(self, prompts: str | list[str], *, max_length: int | None = None, **options: Any) -> Any:
        from transformers import BatchEncoding

        del options
        count = 1 if isinstance(prompts, str) else len(prompts)
        ids = torch.zeros(count, max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def config_folder(source: ModelSource) -> Path:
    """Where the configs of a model's parts lie: its own folder, the hub's cache, or those that ship with sdo.

    Raises:
        EnvironmentFault: no such model, or one whose architecture is not known here.
    """
    place = locate(source.model)
    if is_single_file(place):
        check_parts(read_header(Path(place)), vae=source.vae is not None, text=source.text_encoders is not None)
        return CONFIGS / kind_of(Path(place), source.prediction_type)
    if Path(place).is_dir():
        return Path(place)
    index = cached_file(WeightFile(place, "model_index.json", 0, "", source.revision))
    if index is not None and any((index.parent / name / "config.json").exists() for name in ("unet", "transformer")):
        return index.parent
    known = MODELS.get(place)
    if known is None or known.config is None:
        raise EnvironmentFault(
            f"the architecture of {place} is not known on this machine",
            remedy="fetch the model first, or estimate with the model it is made from: model=…",
        )
    return CONFIGS / known.config


def meta_family(source: ModelSource, dtype: torch.dtype) -> Family:
    """The family of ``source`` without weights, its parts in ``dtype`` as they are when trained.

    Raises:
        EnvironmentFault: see :func:`config_folder`.
    """
    import diffusers

    folder = config_folder(source)
    index = json.loads((folder / "model_index.json").read_text())
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    settings = {k: v for k, v in index.items() if not k.startswith("_") and k not in named}
    parts = {name: _part(folder / name, *value) for name, value in named.items()}
    if source.vae is not None:
        parts["vae"] = _other_vae(source.vae, parts["vae"])
    if "text_encoder_3" in named:
        parts["text_encoder_3"] = _third_encoder(source, parts["text_encoder_3"])
    pipeline = getattr(diffusers, index["_class_name"])(**parts, **settings)
    for name in (name for name in named if name.startswith("tokenizer")):
        setattr(pipeline, name, Lengths(parts.get(name.replace("tokenizer", "text_encoder"))))
    family = family_of(pipeline, source.model)
    family.notes = settle_scheduler(family, source)
    family.to(META, dtype)
    _keep_in_fp32(parts, dtype)
    return family


@lru_cache(maxsize=4)
def plain_family(source: ModelSource, dtype: torch.dtype) -> Family:
    """Like :func:`meta_family`, shared: nothing may be changed about it."""
    return meta_family(source, dtype)


def _part(folder: Path, library: str | None, kind: str | None) -> Any:
    """One part without weights; None for what a pipeline leaves out and for what only reads words or pictures."""
    import diffusers
    import transformers

    if library == "diffusers":
        cls = getattr(diffusers, str(kind))
        with META if issubclass(cls, nn.Module) else torch.device("cpu"):
            return cls.from_config(cls.load_config(folder))
    if library != "transformers" or not (folder / "config.json").is_file():
        return None
    cls = getattr(transformers, str(kind))
    with META:
        return cls(cls.config_class.from_pretrained(folder))


def _other_vae(vae: str, own: Any) -> Any:
    """The VAE a recipe asks for; one that is not on this machine is taken to be built like the model's own."""
    from diffusers import AutoencoderKL

    folder = Path(vae).expanduser()
    found = folder / "config.json" if folder.is_dir() else cached_file(WeightFile(vae, "config.json", 0, ""))
    config = dict(AutoencoderKL.load_config(found.parent) if found and found.is_file() else own.config)
    if vae in NO_UPCAST:
        config["force_upcast"] = False
    with META:
        return AutoencoderKL.from_config(config)


def meta_tiny(source: str, family: Family) -> Any:
    """A small decoder without weights; one that is not on this machine is taken to be built like TAESD."""
    from diffusers import AutoencoderTiny

    folder = Path(source).expanduser()
    found = folder / "config.json" if folder.is_dir() else cached_file(WeightFile(source, "config.json", 0, ""))
    channels = family.vae.config.latent_channels
    config = AutoencoderTiny.load_config(found.parent) if found and found.is_file() else {"latent_channels": channels}
    with META:
        return AutoencoderTiny.from_config(config).to(family.vae.dtype)


def _third_encoder(source: ModelSource, own: Any) -> Any:
    """SD 3's T5, which shipped configs do not have; a single file has none either."""
    from transformers import T5Config, T5EncoderModel

    if not source.t5 or is_single_file(source.model):
        return None
    if own is not None or Path(locate(source.model)).is_dir():
        return own
    with META:
        return T5EncoderModel(T5Config(**T5_XXL))


def _keep_in_fp32(parts: dict[str, Any], dtype: torch.dtype) -> None:
    """What transformers leaves in fp32 when it loads fp16 weights (of T5 one matrix of each block)."""
    for name, part in parts.items():
        if name.startswith("text_encoder") and dtype == torch.float16:
            for inner, module in part.named_modules() if part is not None else ():
                if inner.rpartition(".")[2] in (getattr(part, "_keep_in_fp32_modules", None) or ()):
                    module.float()


def bytes_of(module: nn.Module) -> int:
    """Of weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
