"""LRM: a diffusion model's own features judge a latent; no picture is decoded.

The UNet's way down and its middle, on a latent and the prompt, pooled at every resolution and projected, against the
prompt's embedding, as in CLIP. The authors ask it about every step's latent; here it sees the final one, as theirs does
at the last step. Built on diffusers' UNet, whose way up is dropped.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.base import LatentSpace, RewardInfo, scoring_dtype
from rewards.checkpoints import UNREADABLE, reason
from rewards.kept_prompts import KeptPrompts
from rewards.pickscore import TOKENS, clip_words
from rewards.reading import unread
from sdo_cli.errors import EnvironmentFault, RecipeFault

INFO = RewardInfo(
    name="lrm-1.5",
    summary="human preference, read off the latent by Stable Diffusion's own features; no decoder",
    source="Zhang et al. 2025, arXiv 2502.01051; github.com/Kwai-Kolors/LPO (weights casiatao/LRM)",
    licence="code MIT; weights: none stated where this was written; made from Stable Diffusion's (CreativeML OpenRAIL)",
    range=(-100.0, 100.0),
    sees="latent",
)
SPACES = {
    "lrm-1.5": LatentSpace("Stable Diffusion 1.x and 2.x", channels=4, scaling=0.18215, factor=8),
    "lrm-xl": LatentSpace("SDXL", channels=4, scaling=0.13025, factor=8),
}
# of the middle's features between the prompt and none; the other features are the prompt's alone
GUIDANCE = 7.5


class LatentScore:
    """``exp(t) · cos(projected features of latent and prompt, prompt's embedding)``.

    Args:
        unet: a diffusers ``UNet2DConditionModel``.
        encoders: one CLIP text encoder (SD), or two (SDXL).
        tokenizers: one for each.
        features: of the pooled features to the embedding.
        words: of the text encoder's pooled state to the embedding; SDXL's second encoder has its own.
        log_scale: the temperature's logarithm.
        timestep: at which the features are asked for; above 1 the latent is noised first, always with the same noise.
    """

    def __init__(
        self,
        unet: Any,
        encoders: list[Any],
        tokenizers: list[Any],
        features: nn.Linear,
        words: nn.Linear | None,
        log_scale: Tensor,
        *,
        info: RewardInfo = INFO,
        timestep: int = 1,
    ) -> None:
        self.info, self.latents, self.timestep = info, SPACES[info.name], timestep
        unet.up_blocks, unet.conv_norm_out, unet.conv_act, unet.conv_out = None, None, None, None
        self.unet, self.encoders, self.tokenizers = unet, encoders, tokenizers
        self.features, self.words, self.log_scale = features, words, log_scale
        for part in self._networks():
            part.eval().requires_grad_(False)
        # a row is a quarter of a megabyte
        self._texts = KeptPrompts(most=256)

    def _networks(self) -> list[Any]:
        return [self.unet, *self.encoders, self.features, *([] if self.words is None else [self.words])]

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "LatentScore":
        for part in (self.unet, *self.encoders):
            part.to(device=device, dtype=dtype)
        for part in self._networks()[1 + len(self.encoders) :]:
            part.to(device=device, dtype=scoring_dtype(dtype))
        self.log_scale = self.log_scale.to(device)
        self._texts.clear()
        return self

    def gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        return unread(self.tokenizers[0], prompts, TOKENS)

    def _read(self, prompt: str) -> Tensor:
        """``[1, L · W + P]``: what the UNet reads, and the pooled state."""
        hidden, pooled = [], None
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            ids = tokenizer([prompt], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            out = encoder(ids.input_ids.to(encoder.device), output_hidden_states=True)
            # SD reads the last layer, SDXL the last but one of both
            hidden.append(out.last_hidden_state if self.words is not None else out.hidden_states[-2])
            pooled = out.pooler_output if self.words is not None else out.get("text_embeds")
        assert pooled is not None
        return torch.cat([torch.cat(hidden, dim=-1).flatten(1), pooled], dim=1)

    def _rows(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """``[B, L, W]`` and ``[B, P]``."""
        rows = self._texts.rows(prompts, self._read)
        width = self.unet.config.cross_attention_dim
        read, pooled = rows.split([TOKENS * width, rows.shape[1] - TOKENS * width], dim=1)
        return read.unflatten(1, (TOKENS, width)), pooled

    def score(self, latents: Tensor, prompts: list[str]) -> Tensor:
        exact = scoring_dtype(self.unet.dtype)
        read, pooled = self._rows(prompts)
        blank, blank_pooled = self._rows([""])
        count = len(prompts)
        both = torch.cat([read, blank.expand(count, -1, -1)]), torch.cat([pooled, blank_pooled.expand(count, -1)])
        x = self._noised(latents).to(self.unet.dtype)
        *below, middle = self._pooled(torch.cat([x, x]), *both)
        prompted, plain = middle.to(exact).chunk(2)
        found = [stage[:count].to(exact) for stage in below] + [plain + GUIDANCE * (prompted - plain)]
        seen = self.features(torch.cat(found, dim=1))
        wanted = pooled.to(exact) if self.words is None else self.words(pooled.to(exact))
        return self.log_scale.exp() * (F.normalize(seen, dim=-1) * F.normalize(wanted, dim=-1)).sum(-1)

    def _noised(self, latents: Tensor) -> Tensor:
        """As it is at timestep 1, as the authors do at their last step; else as training saw it."""
        if self.timestep <= 1:
            return latents
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        signal = (1 - betas).cumprod(0)[self.timestep].item()
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
        return signal**0.5 * latents + (1 - signal) ** 0.5 * noise

    def _pooled(self, x: Tensor, read: Tensor, pooled: Tensor) -> list[Tensor]:
        """Means over the places: after each resolution's last layer, and after the middle."""
        unet, dtype = self.unet, self.unet.dtype
        read, t = read.to(dtype), torch.full((len(x),), self.timestep, device=x.device)
        more = self._size_and_text(pooled.to(dtype))
        emb = unet.time_embedding(unet.get_time_embed(x, t))
        added = unet.get_aug_embed(emb, read, more)
        emb = emb if added is None else emb + added
        x, found = unet.conv_in(x), []
        for block in unet.down_blocks:
            reads = {"encoder_hidden_states": read} if getattr(block, "has_cross_attention", False) else {}
            x, between = block(hidden_states=x, temb=emb, **reads)
            # before it is made smaller
            found.append(between[len(block.resnets) - 1].mean((2, 3)))
        return [*found, unet.mid_block(x, emb, encoder_hidden_states=read).mean((2, 3))]

    def _size_and_text(self, pooled: Tensor) -> dict[str, Tensor]:
        """SDXL's: the model's own size, nothing cut off, whatever the latent's."""
        if self.words is not None:
            return {}
        side = float(self.unet.config.sample_size * self.latents.factor)
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=pooled.device, dtype=pooled.dtype)
        return {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}


def build(version: str = "lrm-1.5", *, model: str, timestep: int = 1) -> LatentScore:
    """The reward of ``version``, from a folder as its authors publish it.

    Args:
        model: folder with ``unet``, ``text_encoder``, for lrm-xl ``text_encoder_2``, and ``state_dict.pt``
            (casiatao/LRM on the hub; lrm_sd15, lrm_sdxl).
        timestep: 1 to 999, at which the model's features are asked for; above 1 the latent is noised first, always with
            the same noise.

    Raises:
        EnvironmentFault: files that are not there or do not fit together.
        RecipeFault: a timestep that the model was not trained at.
    """
    if not 1 <= timestep <= 999:
        raise RecipeFault([f"timestep must be from 1 to 999, not {timestep}"], what=f"{version}'s options")
    folder = Path(model).expanduser()
    names = ("text_encoder",) if version == "lrm-1.5" else ("text_encoder", "text_encoder_2")
    for name in ("unet/config.json", *(f"{name}/config.json" for name in names), "state_dict.pt"):
        if not (folder / name).is_file():
            raise EnvironmentFault(f"no {name} in {folder}", remedy=f"give the folder of {version} as published")
    try:
        unet, encoders = _networks(folder, names)
        table = torch.load(folder / "state_dict.pt", weights_only=True, map_location="cpu")
        features = _linear(table["visual_projection"])
        words = _linear(table["text_projection"]) if len(names) == 1 else None
        scale = torch.as_tensor(table["logit_scale"], dtype=torch.float32)
        _check_sizes(unet, encoders, features, words)
    except (*UNREADABLE, TypeError, AttributeError) as fault:
        raise EnvironmentFault(
            f"cannot load {version} from {folder}: {reason(fault)}", remedy="check the folder, or copy it again"
        ) from fault
    tokenizers = [clip_words() for _ in names]
    if len(names) == 2:
        # OpenCLIP's encoder was trained on texts filled up so
        tokenizers[1].pad_token = "!"
    return LatentScore(
        unet, encoders, tokenizers, features, words, scale, info=replace(INFO, name=version), timestep=timestep
    )


def _networks(folder: Path, names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    encoders = []
    for name in names:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        encoder, found = kind.from_pretrained(
            folder / name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        # transformers would go on with random numbers
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{name} lacks {len(missing)} weights, for example {missing[0]}")
        encoders.append(encoder)
    return unet.float(), encoders


def _linear(state: dict[str, Tensor]) -> nn.Linear:
    outputs, inputs = state["weight"].shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.load_state_dict({name: value.float() for name, value in state.items()})
    return layer


def _check_sizes(unet: Any, encoders: list[Any], features: nn.Linear, words: nn.Linear | None) -> None:
    """Raises ValueError, whose sentence stands in the message."""
    channels = unet.config.block_out_channels
    wanted, read = sum(channels) + channels[-1], sum(encoder.config.hidden_size for encoder in encoders)
    if features.in_features != wanted:
        raise ValueError(f"the projection takes {features.in_features} features, and the UNet has {wanted}")
    if unet.config.cross_attention_dim != read:
        raise ValueError(f"the UNet reads {unet.config.cross_attention_dim} numbers a word, the encoders have {read}")
    del words
