"""Draws images: each from its own generator, so that any one can be made again alone or by plain diffusers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.models.base import Family
from sdo_cli.sampling.guidance import Condition, Guided
from sdo_cli.sampling.loop import Path, sample_latents
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import make_scheduler

DECODE_BATCH = 4


@dataclass(frozen=True)
class DrawSettings:
    """How images are drawn; names as in diffusers."""

    solver: str = "ddim"
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None


# generator_for(j) -> the CPU generator of image j
GeneratorFor = Callable[[int], torch.Generator]


@dataclass(frozen=True)
class Noise:
    """Every random number of a batch of images.

    Attributes:
        initial: standard normal ``[B, C, h, w]``.
        injected: one more for every network call, ``[calls, B, C, h, w]``; None unless η > 0.
    """

    initial: Tensor
    injected: Tensor | None = None


def draw_noise(family: Family, settings: DrawSettings, generators: list[torch.Generator]) -> Noise:
    """One generator per image, drawn on the CPU in the order diffusers' pipelines draw."""
    shape = family.latent_shape(settings.height, settings.width)
    initial = torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(family.device)
    if settings.eta == 0:
        return Noise(initial)
    calls = make_route(family, settings).calls
    injected = torch.stack([torch.randn((calls, *shape), generator=g) for g in generators], dim=1)
    return Noise(initial, injected.to(family.device))


def make_route(family: Family, settings: DrawSettings) -> Route:
    scheduler = make_scheduler(settings.solver, family.scheduler_config, settings.num_inference_steps)
    return Route(scheduler, settings.num_inference_steps, eta=settings.eta)


def make_path(
    family: Family,
    settings: DrawSettings,
    noise: Noise,
    condition: Condition,
    negative: Condition | None,
    negative_gradient: bool = True,
) -> Path:
    """The way from ``noise`` to the final latent for these conditions."""
    route = make_route(family, settings)
    denoise = Guided(family.network, condition, negative, settings.guidance_scale, negative_gradient)
    base = Guided(family.base_network, condition, negative, settings.guidance_scale)
    x_0 = noise.initial * getattr(route.scheduler, "init_noise_sigma", 1.0)
    return Path(route, denoise, x_0, noise.injected, base)


def encode_pair(family: Family, settings: DrawSettings, prompts: list[str]) -> tuple[Condition, Condition | None]:
    """Conditions of the prompts and, when guidance needs it, of the negative prompt."""
    negative = None
    if settings.guidance_scale != 1.0:
        single = family.encode([settings.negative_prompt])
        negative = {key: value.expand(len(prompts), *value.shape[1:]) for key, value in single.items()}
    return family.encode(prompts), negative


@torch.no_grad()
def draw_images(
    family: Family,
    prompts: list[str],
    generator_for: GeneratorFor,
    settings: DrawSettings,
    *,
    batch_size: int = 16,
) -> Iterator[Tensor]:
    """Images in pieces ``[≤ batch_size, 3, H, W]`` on the CPU; image j belongs to ``prompts[j]``."""
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = draw_noise(family, settings, [generator_for(start + j) for j in range(len(part))])
        condition, negative = encode_pair(family, settings, part)
        latents = sample_latents(make_path(family, settings, noise, condition, negative))
        # a decoder works at full resolution: far more memory per image than the denoiser
        yield torch.cat([family.decode(few).cpu() for few in latents.split(DECODE_BATCH)])
