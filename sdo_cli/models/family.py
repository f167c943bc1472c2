"""What the families share: parts of a diffusers pipeline, precision, prompts, decoding, LoRA in and out."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.files import as_others, sort_metadata
from sdo_cli.models.lora_carried import finish_loading, refuse_weighted_dora, without_report
from sdo_cli.models.lora_files import find_lora
from sdo_cli.models.lora_read import as_diffusers, read_lora
from sdo_cli.models.lora_stack import is_plain, stack_of
from sdo_cli.models.published_parts import publish_weights, publish_words
from sdo_cli.sampling.guidance import Condition
from sdo_cli.sampling.scheduler_config import write_said

# pixels along the side of what is decoded at a time
TILE = 512


class DiffusersFamily:
    """Base of every family (see :class:`sdo_cli.models.base.Family`).

    A family says how prompts become a condition (:meth:`_embed`) and how its network is called (:meth:`_call`).

    Args:
        pipeline: a loaded diffusers pipeline; its parts are used, its prompt encoding and its LoRA loader.
        source: where it came from, for messages and cards.
    """

    name: str
    pipeline_class: str
    denoiser_name: ClassVar[str] = "unet"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    # all text encoders, and those among them that may carry adapters
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    adaptable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    size_multiple: ClassVar[int] = 8

    def __init__(self, pipeline: Any, source: str) -> None:
        self.source, self.pipeline = source, pipeline
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.vae: Any = pipeline.vae
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self.notes: tuple[str, ...] = ()
        self.second_loras: dict[tuple[str, float], str] = {}
        for part in (self.denoiser, self.vae, *self._encoders().values()):
            part.eval().requires_grad_(False)
        self._dtype, self._autocast = self.denoiser.dtype, False
        # (prompt, negative?) by index, when the text encoders are trained
        self._texts: dict[tuple[str, bool], int] | None = None

    def use_scheduler_config(self, config: Mapping[str, Any]) -> None:
        scheduler = type(self.pipeline.scheduler).from_config(dict(config))
        self.pipeline.scheduler, self.scheduler_config = scheduler, dict(scheduler.config)

    def _encoders(self) -> dict[str, Any]:
        found = {name: getattr(self.pipeline, name, None) for name in self.encoder_names}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: module for name, module in self._encoders().items() if name in self.adaptable_encoders}

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    def adapted(self, adapter: str) -> dict[str, nn.Module]:
        parts = {self.denoiser_name: self.denoiser, **self.text_encoders}
        return {name: part for name, part in parts.items() if adapter in getattr(part, "peft_config", {})}

    # precision and memory

    def to(self, device: torch.device, dtype: torch.dtype, *, train_all: bool = False) -> None:
        self._dtype, self._autocast = dtype, train_all and dtype != torch.float32
        for part in self._encoders().values():
            _cast(part, device, dtype)
        self.vae.to(device=device, dtype=self._vae_dtype(dtype))
        _cast(self.denoiser, device, torch.float32 if train_all else dtype)

    def _vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def text_to(self, device: torch.device) -> None:
        for part in self._encoders().values():
            part.to(device)

    def free_text_encoders(self) -> None:
        for name in self._encoders():
            setattr(self.pipeline, name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def lay_out_channels_last(self) -> None:
        for part in (self.denoiser, self.vae):
            part.to(memory_format=torch.channels_last)

    def tile_vae(self) -> None:
        self.vae.enable_tiling()
        # diffusers' tiles are as large as the images the VAE was trained on, which for SDXL is the whole image
        if self.vae.tile_sample_min_size > TILE:
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = TILE, TILE // self.vae_factor

    def checkpoint_vae(self) -> None:
        if self.vae.use_tiling:
            # block inputs of all tiles would add up to what tiling saves: recompute each tile as a whole
            decoder = self.vae.decoder
            decoder.forward = partial(checkpoint, decoder.forward, use_reentrant=False)
        self.vae.enable_gradient_checkpointing()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        own = self.denoiser.config.sample_size
        h, w = (own, own) if isinstance(own, int) else own
        wrong = [
            f"{side}: must be a multiple of {self.size_multiple} for {self.name} models, not {pixels}"
            for side, pixels in (("height", height), ("width", width))
            if pixels and pixels % self.size_multiple
        ]
        if wrong:
            raise RecipeFault(wrong, what="image size")
        factor = self.vae_factor
        return self.denoiser.config.in_channels, height // factor if height else h, width // factor if width else w

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    # prompts

    def train_text_encoders(self) -> None:
        self._texts = {}

    def encode(self, prompts: list[str]) -> Condition:
        if self._texts is not None:
            return self._named([(prompt, False) for prompt in prompts])
        self._refuse_freed()
        with torch.no_grad():
            return self._embed(prompts)

    def encode_negative(self, prompt: str) -> Condition:
        if self._texts is not None:
            return self._named([(prompt, True)])
        self._refuse_freed()
        with torch.no_grad():
            return self._embed_negative(prompt)

    def _refuse_freed(self) -> None:
        if not self._encoders():
            raise RuntimeError("the text encoders are freed: encode every prompt before")

    def _named(self, keys: list[tuple[str, bool]]) -> Condition:
        assert self._texts is not None
        # the index stays on the CPU: looking it up must not wait for the GPU
        return {"text": torch.tensor([self._texts.setdefault(key, len(self._texts)) for key in keys])}

    def _embed(self, prompts: list[str]) -> Condition:
        """Embeddings ``[B, …]`` of prompts, gradients flowing where they are enabled."""
        raise NotImplementedError

    def _embed_negative(self, prompt: str) -> Condition:
        return self._embed([prompt])

    def _embedded(self, condition: Condition) -> Condition:
        """Encode now what :meth:`train_text_encoders` left as names."""
        if "text" not in condition:
            return condition
        assert self._texts is not None
        keys, wanted = list(self._texts), condition["text"].tolist()
        rows: dict[int, Condition] = {}
        plain = [index for index in dict.fromkeys(wanted) if not keys[index][1]]
        if plain:
            found = self._embed([keys[index][0] for index in plain])
            rows = {index: {k: v[j] for k, v in found.items()} for j, index in enumerate(plain)}
        for index in dict.fromkeys(wanted):
            if keys[index][1]:
                rows[index] = {k: v[0] for k, v in self._embed_negative(keys[index][0]).items()}
        texts = {key: torch.stack([rows[index][key] for index in wanted]) for key in rows[wanted[0]]}
        return texts | {key: value for key, value in condition.items() if key != "text"}

    # network and decoder

    @property
    def takes_guidance(self) -> bool:
        return bool(getattr(self.denoiser.config, "time_cond_proj_dim", None))

    def with_guidance(self, condition: Condition, scale: float) -> Condition:
        rows = len(next(iter(condition.values())))
        # as in diffusers' pipelines: 1 is none
        scales = torch.full((rows,), scale - 1.0)
        width = self.denoiser.config.time_cond_proj_dim
        embedded = self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=width)
        return {**condition, "timestep_cond": embedded.to(self.device)}

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._computing():
            e = self._call(x.to(self._dtype), t, self._cast_floats(self._embedded(condition)))
        return e.to(x.dtype)

    def _cast_floats(self, condition: Condition) -> Condition:
        """Embeddings that are optimised are kept in fp32."""
        return {key: value.to(self._dtype) if value.is_floating_point() else value for key, value in condition.items()}

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self._dtype) if self._autocast else nullcontext()

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(x, t, return_dict=False, **condition)[0]

    @torch.no_grad()
    def base_network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        parts = [part for part in (self.denoiser, *self.text_encoders.values()) if getattr(part, "peft_config", {})]
        for part in parts:
            part.disable_adapters()
        try:
            return self.network(x, t, condition)
        finally:
            for part in parts:
                part.enable_adapters()

    def decode(self, latents: Tensor) -> Tensor:
        z = self._to_vae_scale(latents).to(self.vae.dtype)
        # clamp stops the gradient of saturated pixels, as the saved image would
        return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def _to_vae_scale(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        pixels = (2 * images - 1).to(self.vae.dtype)
        return self._from_vae_scale(self.vae.encode(pixels).latent_dist.mode().to(images.dtype))

    def _from_vae_scale(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor

    # what can be skipped

    # patterns of module names, by grain; each runs once per network call
    skippable_names: ClassVar[Mapping[str, str]] = {
        "blocks": r"(down_blocks|up_blocks)\.\d+|mid_block",
        "parts": r"((down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+",
    }

    def skippable(self, grain: str) -> dict[str, nn.Module]:
        pattern = re.compile(self.skippable_names[grain])
        return {name: module for name, module in self.denoiser.named_modules() if pattern.fullmatch(name)}

    @property
    def architecture(self) -> str:
        # what is only noted down beside the architecture: a file's path, a version
        told = {key: value for key, value in dict(self.denoiser.config).items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # LoRA in and out

    def _layers(self, part: nn.Module, adapter: str) -> dict[str, Tensor]:
        """As this family's ``save_lora_weights`` wants them."""
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        plain = get_peft_model_state_dict(part, adapter_name=adapter)
        layers = convert_state_dict_to_diffusers(plain)
        if part is self.denoiser:
            # diffusers renames attention layers only, and its loader drops those of a file with both kinds of names
            return plain if any(".lora_A." in name for name in layers) else layers
        # the name in every published file; newer transformers drop this level of the text encoder
        return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in layers.items()}

    def save_lora(self, folder: Path, adapter: str = "default") -> None:
        import diffusers

        arguments: dict[str, Any] = {}
        for name, part in self.adapted(adapter).items():
            layers = self._layers(part, adapter)
            if bad := next((key for key, value in layers.items() if not bool(torch.isfinite(value).all())), None):
                raise EnvironmentFault(
                    f"the trained LoRA is not finite: {bad}; it is not written",
                    remedy="go on from an earlier checkpoint with a lower learning_rate or max_grad_norm",
                )
            arguments[f"{name}_lora_layers"] = {k: v.detach().cpu().contiguous() for k, v in layers.items()}
            settings = part.peft_config[adapter].to_dict()  # type: ignore[union-attr,index]
            # sets have another order in every process, and equal files are to be equal
            arguments[f"{name}_lora_adapter_metadata"] = {
                key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
            }
        getattr(diffusers, self.pipeline_class).save_lora_weights(folder, safe_serialization=True, **arguments)
        for path in folder.glob("*.safetensors"):
            sort_metadata(path)
            as_others(path)

    def save_pipeline(self, folder: Path) -> None:
        """Write a diffusers pipeline whose scheduler config says what the model's own says, and no more.

        Text encoders and tokenizers are written as published, whatever the installed transformers calls them.
        """
        self.pipeline.save_pretrained(folder)
        write_said(self.scheduler_config, folder)
        for name in self.adaptable_encoders:
            publish_weights(name, folder / name)
        for name in ("tokenizer", "tokenizer_2"):
            publish_words(folder / name)

    def load_lora(self, path: str, *, adapter: str = "lora", scale: float | None = None) -> None:
        """Load a LoRA, or several (``a:0.8+b``), through diffusers and set the weight.

        Raises:
            EnvironmentFault: nothing there, or made for another model.
        """
        stack = stack_of(path)
        names = [f"{adapter}_{number}" if number else adapter for number in range(len(stack))]
        for name, stacked in zip(names, stack, strict=True):
            self._load_one(stacked.path, name, weight=(1.0 if scale is None else scale) * stacked.scale)
        if scale is not None or not is_plain(path):
            self.pipeline.set_adapters(names, [(1.0 if scale is None else scale) * one.scale for one in stack])
        for part in (self.denoiser, *self._encoders().values()):
            part.eval().requires_grad_(False)

    def check_lora(self, path: str) -> None:
        """Raises EnvironmentFault for what :meth:`load_lora` would not take; nothing is loaded."""
        parts = {self.denoiser_name: self.denoiser, **self.text_encoders}
        for stacked in stack_of(path):
            read_lora(find_lora(stacked.path), parts, family=self.name)

    def _load_one(self, path: str, adapter: str, *, weight: float) -> None:
        parts = {self.denoiser_name: self.denoiser, **self.text_encoders}
        with as_diffusers(find_lora(path), parts, family=self.name) as (where, layers):
            refuse_weighted_dora(layers, weight, path)
            with without_report():
                self.pipeline.load_lora_weights(str(where), adapter_name=adapter, use_safetensors=True)
        for name, modules in layers.items():
            finish_loading(parts[name], name, modules, adapter, Path(path))


def _cast(part: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast a part, but keep its adapters as they are, in fp32: a scaler refuses half-precision gradients."""
    part.to(device=device)
    wide = getattr(part, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if tensor.is_floating_point() and "lora_" not in name:
            # T5's outputs overflow fp16: transformers names the modules that stay in fp32
            keep = dtype == torch.float16 and any(kept in name.split(".") for kept in wide)
            wanted = torch.float32 if keep else dtype
            # one that is in shards is never touched: they are fp32
            if tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)
