"""Rewards that see latents: whose they have to be, and how one measures pictures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rewards
from rewards.base import LatentSpace, Reward
from sdo_cli.errors import RecipeFault
from sdo_cli.models.base import Family


def sees_latents(reward: Reward) -> bool:
    # one that was made without saying what it is sees pictures
    return getattr(getattr(reward, "info", None), "sees", "picture") == "latent"


def check_latent_space(name: str, reward: Reward, family: Family) -> None:
    """Raises RecipeFault for a reward of another model's latents; one that sees pictures fits any model."""
    if not sees_latents(reward):
        return
    wanted: LatentSpace = reward.latents  # type: ignore[attr-defined]
    config = family.vae.config
    scaling, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    same = (config.latent_channels, family.vae_factor) == (wanted.channels, wanted.factor)
    if not same or abs(scaling - wanted.scaling) > 1e-4 or abs(shift - wanted.shift) > 1e-4:
        what = f"{wanted.channels} channels of a {wanted.factor}th of the size, scaled by {wanted.scaling:g}"
        own = f"{config.latent_channels} of a {family.vae_factor}th, scaled by {scaling:g}"
        text = f"{name} reads latents of {wanted.name} ({what}), and {family.source}'s have {own}"
        raise RecipeFault([f"{text}; take a reward made for this model, or one that sees pictures"])


class OfPictures:
    """A latent reward as a measure of pictures, which the model's own VAE encodes, one by one; no gradient."""

    def __init__(self, reward: Any, encode: Callable[[Tensor], Tensor]) -> None:
        self.reward, self.encode = reward, encode
        self.info = replace(reward.info, sees="picture", differentiable=False)

    def __getattr__(self, name: str) -> Any:
        if name != "unread":
            raise AttributeError(name)
        return getattr(self.reward, name)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        latents = torch.cat([self.encode(image) for image in images.split(1)])
        return self.reward.score(latents, prompts)


def as_measure(name: str, reward: Reward, family: Family) -> Reward:
    """The reward itself, or what measures pictures by it.

    Raises:
        RecipeFault: it reads another model's latents.
    """
    if not sees_latents(reward):
        return reward
    check_latent_space(name, reward, family)
    return OfPictures(reward, family.to_latents)


def refuse_latents(name: str, what: str) -> None:
    """Raises RecipeFault where a reward has to see pictures."""
    if rewards.resolve(name) and rewards.sees_latents(name):
        raise RecipeFault([f"{name} sees latents, and {what} needs one that sees pictures"])
