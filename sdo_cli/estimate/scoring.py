"""Cost of decoding and scoring, with and without the backward pass."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rewards import sees_latents
from rewards.base import LatentSpace, Reward
from sdo_cli.device import dtype_of
from sdo_cli.estimate.cost import META, Cost, count
from sdo_cli.estimate.pipelines import bytes_of, meta_family, meta_tiny, plain_family
from sdo_cli.estimate.towers import meta_reward
from sdo_cli.estimate.work import NOTHING
from sdo_cli.models.base import Family
from sdo_cli.models.catalog import tiny_source
from sdo_cli.models.load import ModelSource, source_of
from sdo_cli.models.tiny_decoder import TinyDecoder
from sdo_cli.recipe.schema import Recipe

# of sdo_cli/scoring: images scored at a time when they are only measured
MEASURE_BATCH = 64


@dataclass(frozen=True)
class RewardSetup:
    """A reward by name; ``options`` as JSON, so that it can be looked up."""

    name: str
    options: str

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> "RewardSetup":
        return cls(name, json.dumps(options, sort_keys=True))


@dataclass(frozen=True)
class ScoreSetup:
    """Everything in a recipe that the cost of decoding and scoring depends on.

    Attributes:
        views: altered copies of each picture that rewards score; 0 where they score the picture itself.
        moves: rewards are asked at the picture first, for which way to move it.
    """

    source: ModelSource
    precision: str
    rewards: tuple[RewardSetup, ...]
    reward_precision: str
    vae_checkpointing: bool
    vae_tiling: bool
    reward_checkpointing: bool
    height: int | None
    width: int | None
    decoder: str = "full"
    tiny: str | None = None
    views: int = 0
    moves: bool = False

    @classmethod
    def of(cls, recipe: Recipe, rewards: tuple[RewardSetup, ...]) -> "ScoreSetup":
        return cls(
            source=source_of(recipe),
            precision=recipe.mixed_precision,
            rewards=rewards,
            reward_precision=recipe.reward_precision,
            vae_checkpointing=recipe.vae_checkpointing,
            vae_tiling=recipe.vae_tiling,
            reward_checkpointing=recipe.reward_checkpointing,
            height=recipe.height,
            width=recipe.width,
            decoder=recipe.decoder,
            tiny=recipe.tiny_decoder,
            views=recipe.sight.views if recipe.sight.crop or recipe.sight.noise or recipe.sight.jpeg else 0,
            moves=recipe.sight.sharpness > 0,
        )


@lru_cache(maxsize=2)
def _decoder(setup: ScoreSetup) -> Family:
    family = meta_family(setup.source, dtype_of(setup.precision))
    if setup.vae_tiling:
        family.tile_vae()
    if setup.vae_checkpointing:
        family.checkpoint_vae()
    return family


@lru_cache(maxsize=2)
def _small_decoder(setup: ScoreSetup) -> TinyDecoder | None:
    """Of configs alone; one that is not on this machine is taken to be built like TAESD."""
    if setup.decoder == "full":
        return None
    family = _decoder(setup)
    tiny = meta_tiny(tiny_source(setup.tiny or "embedded:tiny"), family)
    return TinyDecoder(family, tiny, setup.tiny or "", only_jacobian=setup.decoder == "tiny-jacobian", compare=False)


def small_decoder_bytes(setup: ScoreSetup) -> int:
    """Weights of the small decoder; 0 where there is none."""
    found = _small_decoder(setup)
    return bytes_of(found.tiny) if found is not None else 0


def _reward(setup: RewardSetup, precision: str, *, recompute: bool = False) -> Reward:
    reward = meta_reward(setup.name, json.loads(setup.options), dtype_of(precision))
    if recompute and hasattr(reward, "gradient_checkpointing"):
        reward.gradient_checkpointing()
    return reward


def latent_shape(setup: ScoreSetup) -> tuple[int, int, int]:
    """``(C, h, w)`` of the recipe's images."""
    return plain_family(setup.source, dtype_of(setup.precision)).latent_shape(setup.height, setup.width)


def image_size(setup: ScoreSetup) -> tuple[int, int]:
    """Height and width in pixels."""
    _, h, w = latent_shape(setup)
    factor = plain_family(setup.source, dtype_of(setup.precision)).vae_factor
    return h * factor, w * factor


@torch.no_grad()
def _read(reward: Reward, prompts: list[str], seen: tuple[int, int, int]) -> None:
    """Rewards keep what they have read of a prompt: only its first image pays for that."""
    images = torch.empty(len(prompts), *seen, device=META)
    count(lambda: reward.score(images, prompts))


def needs_decoder(setup: ScoreSetup) -> bool:
    """Whether some reward sees pictures."""
    return not all(sees_latents(item.name) for item in setup.rewards)


@lru_cache(maxsize=64)
def score_cost(setup: ScoreSetup, rows: int) -> Cost:
    """Decoder and rewards for ``rows`` samples, and back to the latents.

    Of a view the copy is counted, not what alters it: little beside a reward.
    """
    family = _decoder(setup)
    rewards = [_reward(item, setup.reward_precision, recompute=setup.reward_checkpointing) for item in setup.rewards]
    latents = torch.empty(rows, *latent_shape(setup), device=META)
    prompts = [str(row) for row in range(rows)]
    seen = {"picture": (3, *image_size(setup)), "latent": latent_shape(setup)}
    for reward in rewards:
        _read(reward, prompts, seen[reward.info.sees])

    decode = _small_decoder(setup) or family.decode
    looks = needs_decoder(setup)

    def loss(latent: Tensor, picture: Tensor) -> Tensor:
        losses = torch.zeros(rows, device=META)
        for reward in rewards:
            if reward.info.sees == "latent":
                losses = losses - reward.score(latent, prompts).float()
                continue
            views = [picture * 1.0 for _ in range(setup.views)] or [picture]
            for view in views:
                losses = losses - reward.score(view, prompts).float()
        return losses.sum()

    def score() -> Tensor:
        leaf = latents.detach().requires_grad_()
        picture = decode(leaf) if looks else leaf
        if setup.moves:
            there = picture.detach().requires_grad_()
            picture = picture + torch.autograd.grad(loss(leaf, there), there)[0]
        return torch.autograd.grad(loss(leaf, picture), leaf)[0]

    return count(score)


@lru_cache(maxsize=64)
def decode_cost(setup: ScoreSetup, rows: int) -> Cost:
    """The decoder without a graph."""
    family, latents = _decoder(setup), torch.empty(rows, *latent_shape(setup), device=META)
    with torch.no_grad():
        return count(lambda: family.decode(latents))


@lru_cache(maxsize=64)
def to_latents_cost(setup: ScoreSetup) -> Cost:
    """The encoder on one picture: what a latent reward measures by."""
    family, image = _decoder(setup), torch.empty(1, 3, *image_size(setup), device=META)
    return count(lambda: family.to_latents(image))


@lru_cache(maxsize=64)
def measure_cost(reward: RewardSetup, precision: str, size: tuple[int, int], rows: int) -> Cost:
    """A reward of images that are there, without a graph; free for one that leaves the device. (Of latents, for one
    that sees these.)"""
    model = _reward(reward, precision)
    if not model.info.differentiable:
        return Cost(NOTHING, 0, 0)
    images, prompts = torch.empty(rows, *shape_seen(model, size), device=META), [str(row) for row in range(rows)]
    with torch.no_grad():
        return count(lambda: model.score(images, prompts))


@lru_cache(maxsize=64)
def gradient_cost(reward: RewardSetup, precision: str, size: tuple[int, int]) -> Cost:
    """A reward of one picture (or latent) of this size, and its gradient there; the prompt is read already."""
    model = _reward(reward, precision)
    seen = shape_seen(model, size)
    _read(model, ["0"], seen)

    def score() -> Tensor:
        leaf = torch.empty(1, *seen, device=META, requires_grad=True)
        return torch.autograd.grad(model.score(leaf, ["0"]).sum(), leaf)[0]

    return count(score)


def shape_seen(reward: Reward, size: tuple[int, int]) -> tuple[int, int, int]:
    """Of what a reward is given of pictures of this size."""
    if reward.info.sees != "latent":
        return (3, *size)
    space: LatentSpace = reward.latents  # type: ignore[attr-defined]
    return (space.channels, size[0] // space.factor, size[1] // space.factor)


@lru_cache(maxsize=64)
def reward_bytes(reward: RewardSetup, precision: str) -> int:
    """Of its weights: what is left after building it."""
    return count(lambda: _reward(reward, precision)).left
