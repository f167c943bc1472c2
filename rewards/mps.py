"""MPS: a CLIP ViT-H/14 whose picture tokens look at those words of the prompt that belong to named aspects.

The authors publish a pickled module (``MPS_overall_checkpoint.pth``), which would run code when it is read. Their
weights as a table are on the hub; one's own copy is made where their repository is (docs/rewards.md).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import MPS
from rewards.base import RewardInfo, scoring_dtype
from rewards.checkpoints import read_state, reason
from rewards.kept_prompts import KeptPrompts
from rewards.mps_layers import CrossModel
from rewards.pickscore import TOKENS, clip_words
from rewards.preprocess import Preprocess
from rewards.reading import unread
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="mps-v1",
    summary="human preference: prompt against a picture that has looked at the prompt's words of named aspects",
    source="Zhang et al. 2024, CVPR; github.com/Kwai-Kolors/MPS (MPS_overall_checkpoint)",
    licence="MIT",
    # a cosine times CLIP's largest temperature
    range=(-100.0, 100.0),
)
# the authors' words for the overall preference; their full stop is part of it
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, on which it was trained
VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}


class MpsScore:
    """``exp(t) · cos(prompt, first picture token after cross attention)``.

    Args:
        net: a ``transformers.CLIPModel``.
        cross: the layers in which picture tokens ``[B, T, D]`` look at prompt tokens ``[B, L, D]``.
        tokenizer: transformers', as :func:`rewards.pickscore.clip_words` makes it.
        condition: aspects in words; a prompt token that is like none of them is not looked at.
        threshold: how like, as a share of the likest.
    """

    info = INFO

    def __init__(
        self, net: Any, cross: CrossModel, tokenizer: Any, condition: str = OVERALL, threshold: float = 0.3
    ) -> None:
        self.net, self.cross = net.eval().requires_grad_(False), cross.eval().requires_grad_(False)
        self.tokenizer, self.condition, self.threshold = tokenizer, condition, threshold
        # rounded to half precision, a temperature of 100 would be 98.9
        self.log_scale = net.logit_scale.detach().clone()
        self.preprocess = Preprocess(net.config.vision_config.image_size, floors_crop=True)
        # a row is a third of a megabyte
        self._texts, self._aspects = KeptPrompts(most=256), KeptPrompts(most=1)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "MpsScore":
        self.net.to(device=device, dtype=dtype)
        self.cross.to(device=device, dtype=dtype)
        self.log_scale = self.log_scale.to(device)
        self._texts.clear()
        self._aspects.clear()
        return self

    def gradient_checkpointing(self) -> None:
        # transformers recomputes only in training mode, which changes nothing else here: there is no dropout
        self.net.vision_model.train()
        self.net.gradient_checkpointing_enable({"use_reentrant": False})
        self.cross.recompute = True

    def unread(self, prompts: list[str]) -> tuple[int, list[str]]:
        return unread(self.tokenizer, prompts, self.net.config.text_config.max_position_embeddings)

    def _words(self, text: str) -> tuple[Tensor, Tensor]:
        """Projected states ``[1, L, D]`` of all 77 tokens, filled up with the end mark, and ``[1, D]`` of the first."""
        ids = self.tokenizer(
            [text], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids.to(self.net.device)
        out = self.net.text_model(input_ids=ids)
        return self.net.text_projection(out.last_hidden_state), self.net.text_projection(out.pooler_output)

    def _read(self, prompt: str) -> Tensor:
        """``[1, L · D + D + L]``: tokens, the prompt's unit-length embedding, and 0 or -inf for each token."""
        tokens, end = self._words(prompt)
        exact = scoring_dtype(self.net.dtype)
        aspects = self._aspects.rows([self.condition], lambda text: self._words(text)[0]).to(exact)
        likeness = (aspects @ tokens.to(exact).mT).amax(1)
        bias = torch.where(likeness / likeness.max() > self.threshold, 0.0, -math.inf)
        return torch.cat([tokens.to(exact).flatten(1), F.normalize(end.to(exact), dim=-1), bias.to(exact)], dim=1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        width, dtype = self.net.config.projection_dim, self.net.dtype
        tokens, ends, bias = self._texts.rows(prompts, self._read).split([TOKENS * width, width, TOKENS], dim=1)
        seen = self.net.vision_model(pixel_values=self.preprocess(images).to(dtype)).last_hidden_state
        looked = self.cross(
            self.net.visual_projection(seen), tokens.unflatten(1, (TOKENS, width)).to(dtype), bias.to(dtype)
        )
        pictures = F.normalize(looked[:, 0].to(scoring_dtype(dtype)), dim=-1)
        return self.log_scale.exp() * (pictures * ends).sum(-1)


def build(
    checkpoint: str | None = None, config: str | None = None, condition: str = OVERALL, threshold: float = 0.3
) -> MpsScore:
    """The published model of overall preference.

    Args:
        checkpoint: its weights as a table: the file on the hub, fetched when not given, or one's own copy of the
            authors' pickled module (docs/rewards.md says how it is made).
        config: ``config.json`` of its CLIP, that of ViT-H/14 when not given.
        condition: aspects that count, in words; the authors' whole list when not given.
        threshold: a token of the prompt is looked at where its likeness to the aspects is above this share of the
            likest token's. 0.3 is that of the authors' evaluations, 0.01 that of their training.

    Raises:
        EnvironmentFault: files that are not there or do not fit together.
        RecipeFault: a threshold from 1, above which no token is looked at, or no condition.
    """
    if not 0 <= threshold < 1:
        raise RecipeFault([f"threshold must be from 0 to below 1, not {threshold}"], what="mps-v1's options")
    if not condition.strip():
        raise RecipeFault(["condition must name at least one aspect"], what="mps-v1's options")
    path = find_file(MPS) if checkpoint is None else Path(checkpoint).expanduser()
    state = read_state(path, "MPS checkpoint", CONVERT)
    try:
        net, cross = _parts(state, _config(config))
    except (KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise EnvironmentFault(
            f"the MPS checkpoint {path.name} does not fit {config or 'CLIP ViT-H/14'}",
            remedy="give all of MPS's weights, and the config.json of another CLIP in `config`",
        ) from fault
    return MpsScore(net, cross, clip_words(), condition, threshold)


CONVERT = "copy or download it again; MPS_overall_checkpoint.pth has to be made a table first (docs/rewards.md)"


def _config(path: str | None) -> dict[str, Any]:
    if path is None:
        return VIT_H
    try:
        read = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as fault:
        raise EnvironmentFault(
            f"cannot read {path}: {reason(fault)}", remedy="give a CLIPModel's config.json"
        ) from fault
    if not isinstance(read, dict):
        raise EnvironmentFault(f"{path} is no table of settings", remedy="give a CLIPModel's config.json")
    return read


def _parts(state: dict[str, Tensor], config: dict[str, Any]) -> tuple[Any, CrossModel]:
    """CLIP and cross attention with the weights of a published state."""
    from transformers import CLIPConfig, CLIPModel

    net = CLIPModel(CLIPConfig.from_dict(config))
    # the copy on the hub stands one level deeper
    state = {name.removeprefix("mps."): value for name, value in state.items()}
    clip = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    # a table of 0, 1, 2 … that older libraries saved
    net.load_state_dict({k: v for k, v in clip.items() if not k.endswith("position_ids")})
    layers = {k.removeprefix("cross_model."): v for k, v in state.items() if k.startswith("cross_model.")}
    return net, CrossModel.of(layers)
