"""From the settings of `sdo optimize` to models, objectives and the first state of every image."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewards.base import Reward
from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, check_pictures, decode_batch, draw_settings, encode_pair
from sdo_cli.drawing.pictures import read_image
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.base import Family
from sdo_cli.models.load import load_family, source_of
from sdo_cli.recipe.steering import LoadedSteering
from sdo_cli.recipe.steering_schema import Steering
from sdo_cli.sampling.loop import Path as Way
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.sampling.steering import Steered
from sdo_cli.scoring.latents import as_measure
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.steering.inversion import invert
from sdo_cli.steering.objectives import ImageObjective, OfReward, Wish, fitted, wish_of
from sdo_cli.steering.variables import Canvas, State, first_state
from sdo_cli.weights.needs import explaining, reward_options


@dataclass(frozen=True)
class Job:
    """Attributes:
    prompts: of every image, ``num_images`` of each after each other.
    measures: rewards by name that nothing is optimised by.
    """

    spec: Steering
    family: Family
    settings: DrawSettings
    embed: PromptEmbeddings
    prompts: list[str]
    wishes: list[Wish]
    measures: dict[str, Reward]

    @property
    def rewards(self) -> dict[str, Reward]:
        """Every reward that scores, by name."""
        wanted = {wish.name: wish.part.reward for wish in self.wishes if isinstance(wish.part, OfReward)}
        return wanted | self.measures

    def groups(self) -> list[range]:
        """Images that are computed together."""
        size = self.spec.batch_size
        return [range(first, min(first + size, len(self.prompts))) for first in range(0, len(self.prompts), size)]

    def canvas(self, which: range, *, start: int | None = None, guidance: float | None = None) -> Canvas:
        prompts = [self.prompts[j] for j in which]
        guides = (self.settings.guidance_scale if guidance is None else guidance) != 1.0
        negative = self.embed.negative(self.settings.negative_prompt, len(prompts)) if guides else None
        return Canvas(self.family, self.settings, self.spec.start if start is None else start, prompts, negative)


@dataclass(frozen=True)
class Begun:
    """Where a group begins.

    Attributes:
        sources: pictures it was inverted from, ``[B, 3, H, W]``; None when it was drawn from noise.
        errors: of the inversion by name, ``[B]`` root-mean-square differences of pixels.
    """

    canvas: Canvas
    state: State
    sources: Tensor | None
    errors: dict[str, Tensor]


def prepare(loaded: LoadedSteering) -> Job:
    """Load models, rewards and pictures; prompts are encoded first and the text encoders freed."""
    spec, device = loaded.spec, pick_device()
    recipe = spec.as_recipe()
    with explaining(recipe, loaded.given):
        dtype = dtype_of(spec.mixed_precision)
        family = load_family(source_of(recipe), dtype=dtype)
        if family.takes_guidance:
            raise EnvironmentFault(
                f"{spec.model} is an LCM network, whose guidance is an input: it cannot be steered yet",
                remedy="use the model that it was distilled from, or sdo finetune",
            )
        if spec.lora is not None:
            family.load_lora(spec.lora, scale=spec.lora_scale)
        embed = PromptEmbeddings(family)
        embed.prepare(loaded.prompts, spec.negative_prompt, device)
        family.to(device, dtype)
        if spec.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        if spec.vae_checkpointing:
            family.checkpoint_vae()
        wishes = [wish_of(item, recipe, device, spec.seed) for item in spec.objectives]
        precision = dtype_of(spec.reward_precision)
        measures = {
            item.name: as_measure(
                item.name, build_reward(item.name, reward_options(item, recipe), device, precision), family
            )
            for item in spec.measures
        }
    prompts = [prompt for prompt in loaded.prompts for _ in range(spec.num_images)]
    return Job(spec, family, draw_settings(recipe), embed, prompts, wishes, measures)


def begin(job: Job, which: range) -> Begun:
    """Noise of `sdo sample`'s seeds walked to the start, or the pictures, inverted."""
    canvas = job.canvas(which)
    if not job.spec.images:
        generators = [torch.Generator("cpu").manual_seed(job.spec.seed + j) for j in which]
        return Begun(canvas, first_state(canvas, job.embed, generators), None, {})
    return _inverted(job, canvas, which)


def objective_of(job: Job, begun: Begun, which: range) -> ImageObjective:
    return ImageObjective(job.family, job.wishes, begun.canvas.prompts, which.start, begun.sources)


def _inverted(job: Job, canvas: Canvas, which: range) -> Begun:
    spec, family = job.spec, job.family
    names = spec.images * len(job.prompts) if len(spec.images) == 1 else spec.images
    factor = family.vae_factor
    shape = family.latent_shape(job.settings.height, job.settings.width)
    height, width = (factor * side for side in shape[1:])
    pictures = [fitted(read_image(Path(names[j])), height, width) for j in which]
    sources = torch.stack(pictures).to(family.device)
    x_N = torch.cat([family.to_latents(few) for few in sources.split(decode_batch(family, torch.empty(0, *shape)))])
    guidance = job.settings.guidance_scale if spec.inversion_guidance is None else spec.inversion_guidance
    condition, _ = encode_pair(job.embed, job.settings, canvas.prompts)
    shared = {key: value[None] for key, value in condition.items()}
    negative = job.canvas(which, guidance=guidance).negative
    scale = x_N.new_full((1, len(x_N)), guidance)
    denoise = Steered(family.network, shared, negative, scale, canvas.levels())
    route = canvas.route
    latent = invert(Way(route, denoise, x_N), x_N, iterations=spec.inversion_iterations) / route.noise_level
    state = State(latent, shared, x_N.new_full((1, len(x_N)), job.settings.guidance_scale))
    errors = {
        "autoencoder": _difference(decoded(family, x_N), sources),
        "inversion": _difference(render(canvas, state), sources),
    }
    return Begun(canvas, state, sources, errors)


def _difference(images: Tensor, sources: Tensor) -> Tensor:
    """Root-mean-square difference of pixels, ``[B]``."""
    return (images - sources.to(images)).square().flatten(1).mean(1).sqrt().cpu()


@torch.no_grad()
def decoded(family: Family, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]``, a few at a time."""
    images = torch.cat([family.decode(few) for few in latents.split(decode_batch(family, latents))])
    check_pictures(images, [f"number {j}" for j in range(len(images))])
    return images


@torch.no_grad()
def render(canvas: Canvas, state: State) -> Tensor:
    """The images that a state makes."""
    return decoded(canvas.family, sample_latents(canvas.path(state)))
