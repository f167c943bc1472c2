"""Draws images: each from its own generator, so that any one can be made again alone or by plain diffusers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.models.base import Family
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.guidance import Condition, Guided, Network
from sdo_cli.sampling.loop import Path, sample_latents
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import AUTO, SOLVERS, STOCHASTIC, Native, make_scheduler, native_solver
from sdo_cli.skipping.multistep import Multistep
from sdo_cli.skipping.walking import Skips

# a decoder works at full resolution, with far more memory per pixel than the denoiser
DECODE_PIXELS = 4 * 512 * 512
DECODE_BATCH = 4


@dataclass(frozen=True)
class DrawSettings:
    """How images are drawn; names as in diffusers.

    ``timesteps``, falling and as many as ``num_inference_steps``, take the place of the solver's own,
    and ``multistep``, learned for them, that of its steps.
    """

    solver: str = AUTO
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    timesteps: tuple[int, ...] | None = None
    multistep: Multistep | None = None

    @property
    def guidance(self) -> float:
        """The scale that counts. As in diffusers' pipelines, everything up to 1 is without guidance, which is 1."""
        return max(1.0, self.guidance_scale)


def draw_settings(recipe: Recipe) -> DrawSettings:
    """What a recipe says of drawing."""
    return DrawSettings(
        solver=recipe.solver,
        eta=recipe.eta,
        num_inference_steps=recipe.num_inference_steps,
        timesteps=None if recipe.timesteps is None else tuple(recipe.timesteps),
        guidance_scale=recipe.guidance_scale,
        negative_prompt=recipe.negative_prompt,
        height=recipe.height,
        width=recipe.width,
    )


def branches(family: Family, settings: DrawSettings) -> int:
    """Rows of a network call for each picture: guidance is one more, unless the network takes it as an input."""
    return 1 if settings.guidance == 1.0 or family.takes_guidance else 2


# generator_for(j) -> the CPU generator of image j
GeneratorFor = Callable[[int], torch.Generator]


@dataclass(frozen=True)
class Noise:
    """Every random number of a batch of images.

    Attributes:
        initial: standard normal ``[B, C, h, w]``.
        injected: one more for every network call, ``[calls, B, C, h, w]``; None unless the solver takes noise.
    """

    initial: Tensor
    injected: Tensor | None = None


def draw_noise(family: Family, settings: DrawSettings, generators: list[torch.Generator]) -> Noise:
    """One generator per image, drawn on the CPU in the order diffusers' pipelines draw."""
    shape = family.latent_shape(settings.height, settings.width)
    initial = torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(family.device)
    route = make_route(family, settings)
    if not route.takes_noise:
        return Noise(initial)
    injected = torch.stack([torch.randn((route.calls, *shape), generator=g) for g in generators], dim=1)
    return Noise(initial, injected.to(family.device))


def solver_of(family: Family, settings: DrawSettings) -> str:
    """The solver's name; for ``auto`` the model's own, or what stands in for it."""
    return native_of(family, settings).solver if settings.solver == AUTO else settings.solver


def native_of(family: Family, settings: DrawSettings) -> Native:
    """What ``auto`` stands for with these settings."""
    own = native_solver(family.scheduler_config)
    if settings.eta > 0 and own.solver not in STOCHASTIC and not SOLVERS[own.solver].flow:
        return Native(STOCHASTIC[0], f"{own.solver}, which takes no eta")
    return own


def make_route(family: Family, settings: DrawSettings) -> Route:
    """The solver's route; raises RecipeFault for noise a model's own solver does not take."""
    solver = solver_of(family, settings)
    if settings.eta > 0 and solver not in STOCHASTIC:
        raise RecipeFault([f"eta: solver {solver} of {family.source} takes no noise; write 0"], what="settings")
    config = json.dumps(dict(family.scheduler_config), sort_keys=True)
    return _route(solver, config, settings.num_inference_steps, settings.eta, settings.timesteps, settings.multistep)


@lru_cache(maxsize=64)
def _route(
    solver: str, config: str, steps: int, eta: float, timesteps: tuple[int, ...] | None, multistep: Multistep | None
) -> Route:
    """Made once: every step of training asks for it several times."""
    scheduler = make_scheduler(solver, json.loads(config), steps, timesteps, multistep)
    return Route(scheduler, steps, eta=eta, timesteps=timesteps)


def make_path(
    family: Family,
    settings: DrawSettings,
    noise: Noise,
    condition: Condition,
    negative: Condition | None,
    negative_gradient: bool = True,
    skips: Skips | None = None,
    network: Network | None = None,
) -> Path:
    """The way from ``noise`` to the final latent for these conditions; ``network`` in place of the family's."""
    route, scale = make_route(family, settings), settings.guidance
    if family.takes_guidance:
        condition, negative, scale = family.with_guidance(condition, settings.guidance_scale), None, 1.0
    multiples = None
    if settings.multistep is not None and settings.multistep.guidance and scale != 1.0:
        multiples = route.begin()[1], torch.tensor(settings.multistep.guidance, dtype=torch.float64)
    denoise = Guided(network or family.network, condition, negative, scale, negative_gradient, multiples)
    base = Guided(family.base_network, condition, negative, scale, multiples=multiples)
    x_0 = noise.initial * getattr(route.scheduler, "init_noise_sigma", 1.0)
    return Path(route, denoise, x_0, noise.injected, base, skips)


def encode_pair(
    embed: PromptEmbeddings, settings: DrawSettings, prompts: list[str]
) -> tuple[Condition, Condition | None]:
    """Conditions of the prompts and, when guidance needs it, of the negative prompt."""
    if settings.guidance == 1.0:
        return embed(prompts), None
    return embed(prompts), embed.negative(settings.negative_prompt, len(prompts))


@torch.no_grad()
def draw_images(
    family: Family,
    prompts: list[str],
    generator_for: GeneratorFor,
    settings: DrawSettings,
    *,
    batch_size: int = 16,
    embed: PromptEmbeddings | None = None,
    skips: Skips | None = None,
    network_for: Callable[[], Network] | None = None,
) -> Iterator[Tensor]:
    """Images in pieces ``[≤ batch_size, 3, H, W]`` on the CPU; image j belongs to ``prompts[j]``.

    Args:
        embed: conditions encoded before, needed once the text encoders are freed.
        skips: what is left out of the network; see :func:`sdo_cli.drawing.pruned.skips_of`.
        network_for: makes, for each piece, what stands in place of the family's network.
    """
    embed = embed or PromptEmbeddings(family)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = draw_noise(family, settings, [generator_for(start + j) for j in range(len(part))])
        condition, negative = encode_pair(embed, settings, part)
        network = network_for() if network_for else None
        path = make_path(family, settings, noise, condition, negative, skips=skips, network=network)
        latents = sample_latents(path)
        images = torch.cat([family.decode(few).cpu() for few in latents.split(decode_batch(family, latents))])
        check_pictures(images, part)
        yield images


def check_pictures(images: Tensor, prompts: list[str]) -> None:
    """Raises EnvironmentFault for pictures ``[B, …]`` that are not finite: saved they are black, and can be scored."""
    bad = [prompt for image, prompt in zip(images, prompts, strict=True) if not bool(torch.isfinite(image).all())]
    if bad:
        raise EnvironmentFault(
            f"{len(bad)} of {len(images)} pictures are not finite, the first of {bad[0]!r}: numbers overflowed",
            remedy="compute in bf16 or fp32 (--precision no, mixed_precision: no); with a LoRA, try a smaller scale",
        )


def decode_batch(family: Family, latents: Tensor) -> int:
    """Images decoded at a time: four of 512 pixels, one of 1024."""
    pixels = latents.shape[-1] * latents.shape[-2] * family.vae_factor**2
    return max(1, min(DECODE_BATCH, DECODE_PIXELS // pixels))
