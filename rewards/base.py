"""The contract every reward keeps. Nothing here knows about training."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """Whose latents a reward reads: those that a VAE of this shape makes, times ``scaling``.

    Attributes:
        name: of the models, in words.
        factor: pixels per latent, along one side.
    """

    name: str
    channels: int
    scaling: float
    factor: int
    shift: float = 0.0


@dataclass(frozen=True)
class RewardInfo:
    """What a reward is, for lists, cards and manifests.

    Attributes:
        name: versioned name, for example ``aesthetic-v2``.
        summary: one line: what a higher score means.
        source: paper or repository of the reference implementation.
        licence: licence of the weights.
        range: the interval scores usually fall in.
        differentiable: whether gradients flow from the score to the images.
        trainable: False for rewards that only measure; no recipe may train on them.
        sees: ``picture``, or ``latent``: the final latent x_N, so that nothing is decoded for it.
    """

    name: str
    summary: str
    source: str
    licence: str
    range: tuple[float, float]
    differentiable: bool = True
    trainable: bool = True
    sees: str = "picture"


@runtime_checkable
class Reward(Protocol):
    """Scores images, each on its own.

    ``score(images, prompts)`` takes images ``[B, 3, H, W]``, RGB in [0, 1], with gradients flowing, and one
    prompt per image; it returns ``[B]``, higher is better. It never guesses the pixel range and never uses
    statistics of the batch. What it keeps between calls does not show: scores are equal bit for bit whatever was scored
    before.

    One that sees latents (``info.sees``) gets x_N ``[B, C, h, w]`` in place of images, scaled as the network knows it,
    and says in ``latents``, a :class:`LatentSpace`, whose they have to be.

    A reward with weights also has ``to(device, dtype)``, and ``gradient_checkpointing()`` where its layers can be
    recomputed in the backward pass; one made of others has ``parts(images, prompts)``, their scores by name. One that
    reads prompts up to a length has ``unread(prompts)``: the number of tokens, and the prompts that are longer.
    """

    info: RewardInfo

    def score(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def scoring_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what cosines and heads are computed: at least float32, also where the towers run in half precision.

    bf16 has steps of 0.002 at an HPS of 0.27 and of 0.125 at a PickScore of 21, as large as what training gains.
    """
    return torch.promote_types(dtype, torch.float32)
