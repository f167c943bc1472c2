"""What is wanted of an image, as losses: rewards, the style of a picture, a text, a target picture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import rewards as reward_table
from rewards.base import Reward
from rewards.clip_encoder import ClipEncoder
from rewards.clip_score import openai_clip
from sdo_cli.device import dtype_of
from sdo_cli.drawing.pictures import read_image
from sdo_cli.gradients.outcome import Scored
from sdo_cli.models.base import Family
from sdo_cli.recipe.schema import Recipe
from sdo_cli.recipe.steering_schema import ObjectiveSpec
from sdo_cli.scoring.latents import refuse_latents
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.seeding import keyed_generator
from sdo_cli.weights.needs import reward_options

STYLE_LAYER = 2
# as the authors of SDO weigh the text against the source picture
ALPHA = 0.5
AUGMENTATIONS = 4
# among the values: the loss by which steps are compared
COMPARED = "compared"


@dataclass(frozen=True)
class Seen:
    """A batch of decoded images and what they belong to.

    Attributes:
        images: ``[R, 3, H, W]`` in [0, 1], gradients flowing.
        sources: the same samples before anything was changed, or the pictures they begin from, ``[R, 3, H, W]``.
        numbers: of the samples in the whole job, for draws of their own.
        progress: 0 at the first step, 1 at the last.
    """

    images: Tensor
    prompts: list[str]
    sources: Tensor
    numbers: list[int]
    step: int
    progress: float


class Part(Protocol):
    """One wish. ``values`` are ``[R]``: higher is better when ``higher`` is true, and the loss is their negative."""

    @property
    def higher(self) -> bool: ...

    def values(self, seen: Seen) -> Tensor: ...

    def compared(self, seen: Seen, values: Tensor) -> Tensor:
        """What images of different steps are compared by, and reports say; of a schedule, its end's."""
        return values


@dataclass(frozen=True)
class OfReward(Part):
    reward: Reward
    higher: bool = True

    def values(self, seen: Seen) -> Tensor:
        return self.reward.score(seen.images, seen.prompts).float()


def gram(tokens: Tensor) -> Tensor:
    """``[B, D, D]`` of tokens ``[B, T, D]``: which features occur together, wherever they are (Gatys et al. 2015)."""
    return tokens.transpose(1, 2) @ tokens / tokens.shape[1]


@dataclass(frozen=True)
class Style(Part):
    """Mean-square difference of Gram matrices of CLIP patch tokens (SDO, arXiv 2505.07477; block 2 as there)."""

    encoder: ClipEncoder
    picture: Tensor
    layer: int = STYLE_LAYER
    higher: bool = False

    @cached_property
    def wanted(self) -> Tensor:
        with torch.no_grad():
            return gram(self.encoder.patch_tokens(self.picture[None], self.layer))

    def values(self, seen: Seen) -> Tensor:
        return (gram(self.encoder.patch_tokens(seen.images, self.layer)) - self.wanted).square().flatten(1).mean(1)


@dataclass(frozen=True)
class TextEdit(Part):
    """``α (1 - cos(image, text)) + (1 - α) L1(image, source)``, the cosine a mean over moved and turned copies.

    Attributes:
        text: ``{prompt}`` in it stands for the image's own prompt.
        alpha: at the first and at the last step, linear between.
        copies: 0 looks at the image itself.
        seed: of the copies' draws.
    """

    encoder: ClipEncoder
    text: str
    alpha: tuple[float, float] = (ALPHA, ALPHA)
    copies: int = AUGMENTATIONS
    seed: int = 0
    higher: bool = False

    def values(self, seen: Seen) -> Tensor:
        images, count = seen.images, max(1, self.copies)
        many = images.repeat_interleave(count, 0) if self.copies else images
        if self.copies:
            many = augmented(many, [self._generator(n, seen.step, c) for n in seen.numbers for c in range(count)])
        texts = self.encoder.prompts([self.text.replace("{prompt}", prompt) for prompt in seen.prompts])
        cosine = (self.encoder.images(many) * texts.repeat_interleave(count, 0)).sum(-1)
        alpha = self._alpha(seen)
        return alpha * (1 - cosine.view(-1, count).mean(1)) + (1 - alpha) * self._away(seen)

    def compared(self, seen: Seen, values: Tensor) -> Tensor:
        now, end = self._alpha(seen), self.alpha[1]
        if now in (0, end):
            return values
        away = self._away(seen)
        return end * (values - (1 - now) * away) / now + (1 - end) * away

    def _alpha(self, seen: Seen) -> float:
        return self.alpha[0] + (self.alpha[1] - self.alpha[0]) * seen.progress

    def _away(self, seen: Seen) -> Tensor:
        return (seen.images - seen.sources).abs().flatten(1).mean(1)

    def _generator(self, number: int, step: int, copy: int) -> torch.Generator:
        return keyed_generator(self.seed, f"augmentation {copy}", step, number)


def augmented(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Each image turned by up to 10°, enlarged by up to a quarter and moved within its frame; gradients flow."""
    draws = torch.stack([torch.rand(4, generator=g, dtype=torch.float64) for g in generators])
    angle, size = (2 * draws[:, 0] - 1) * torch.pi / 18, 1 / (1 + draws[:, 1] / 4)
    shift = (2 * draws[:, 2:] - 1) * (1 - size)[:, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    theta = torch.cat([size.view(-1, 1, 1) * turn, shift[:, :, None]], 2).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@dataclass(frozen=True)
class Target(Part):
    """Distance to a picture: mean absolute (``l1``) or squared (``l2``) difference of pixels."""

    picture: Tensor
    loss: str = "l2"
    higher: bool = False

    def values(self, seen: Seen) -> Tensor:
        difference = seen.images - fitted(self.picture, seen.images.shape[-2], seen.images.shape[-1])
        return (difference.abs() if self.loss == "l1" else difference.square()).flatten(1).mean(1)


def fitted(picture: Tensor, height: int, width: int) -> Tensor:
    """``[3, height, width]``: the middle of a picture, shrunk or enlarged to fill the frame."""
    if picture.shape[-2:] == (height, width):
        return picture
    scale = max(height / picture.shape[-2], width / picture.shape[-1])
    size = [max(height, round(picture.shape[-2] * scale)), max(width, round(picture.shape[-1] * scale))]
    large = F.interpolate(picture[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Wish:
    """A part with its name and weight."""

    name: str
    part: Part
    weight: float

    def loss_of(self, values: Tensor) -> Tensor:
        return self.weight * (-values if self.part.higher else values)


def wish_of(spec: ObjectiveSpec, recipe: Recipe, device: torch.device, seed: int) -> Wish:
    """An objective, built."""
    dtype = dtype_of(recipe.reward_precision)
    if spec.reward is not None:
        refuse_latents(spec.value, "sdo optimize")
        reward = build_reward(spec.value, reward_options(spec.reward, recipe), device, dtype)
        return Wish(spec.name, OfReward(reward), spec.weight)
    if spec.kind == "image":
        part: Part = Target(read_image(Path(spec.value)).to(device), spec.options.get("loss", "l2"))
        return Wish(spec.name, part, spec.weight)
    given = {key: value for key, value in spec.options.items() if key in ("model", "pretrained", "tag")}
    if recipe.model.startswith("embedded"):
        given = reward_table.with_embedded("clip-score", given)
    encoder = openai_clip(given.get("model"), given.get("pretrained"), given.get("tag")).to(device, dtype)
    if spec.kind == "style":
        picture = read_image(Path(spec.value)).to(device)
        return Wish(spec.name, Style(encoder, picture, spec.options.get("layer", STYLE_LAYER)), spec.weight)
    alpha = spec.options.get("alpha", ALPHA)
    pair = alpha if isinstance(alpha, list) else [alpha]
    copies = spec.options.get("augmentations", AUGMENTATIONS)
    return Wish(spec.name, TextEdit(encoder, spec.value, (pair[0], pair[-1]), copies, seed), spec.weight)


@dataclass
class ImageObjective:
    """Loss per sample ``Σ weight · loss`` of the decoded images, each on its own; the engines call it.

    Attributes:
        sources: ``[B, 3, H, W]``; the first images that are seen, unless given.
        number: of the first sample in the whole job.
        watch: is handed the images of every sample that was scored.
    """

    family: Family
    wishes: list[Wish]
    prompts: list[str]
    number: int = 0
    sources: Tensor | None = None
    step: int = 0
    progress: float = 0.0
    watch: Callable[[Tensor, Tensor], None] | None = None
    _seen: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, x_N: Tensor, rows: Tensor) -> Scored:
        images = self.family.decode(x_N)
        which = rows.tolist()
        seen = Seen(
            images,
            [self.prompts[row] for row in which],
            self._sources_of(images, which),
            [self.number + row for row in which],
            self.step,
            self.progress,
        )
        losses, values = images.new_zeros(len(images)), {COMPARED: images.new_zeros(len(images))}
        for wish in self.wishes:
            value = wish.part.values(seen)
            losses = losses + wish.loss_of(value)
            values[wish.name] = wish.part.compared(seen, value).detach()
            values[COMPARED] = values[COMPARED] + wish.loss_of(values[wish.name])
        if self.watch is not None:
            self.watch(images.detach(), rows)
        return Scored(losses, values)

    def _sources_of(self, images: Tensor, which: list[int]) -> Tensor:
        if self.sources is not None:
            return self.sources[which]
        for row, image in zip(which, images.detach(), strict=True):
            self._seen.setdefault(row, image)
        return torch.stack([self._seen[row] for row in which])
