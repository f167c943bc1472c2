"""What `sdo sample` does: load, draw, write files."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sdo_cli.device import described, dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, draw_images, make_route, solver_of
from sdo_cli.drawing.lora_timing import LoraTiming, TimedNetwork, check_timed
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.parameters import lora_tags, parameters_text, png_note
from sdo_cli.drawing.pictures import save_image
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import other_weights, skips_of, with_plan
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.skipping.skip_plan import SkipPlan
from sdo_cli.skipping.walking import Skips


@dataclass(frozen=True)
class SampleJob:
    """Attributes:
    model: weights to draw with.
    lora: run folder or file, None for the plain model.
    seed: image j (over all prompts and copies) starts from ``manual_seed(seed + j)``.
    plan: what is left out of the network.
    timing: where the LoRA is not there, or not with one weight, at every step; ``lora_scale`` is then its ``loaded``.
    """

    model: ModelSource
    lora: str | None
    lora_scale: float
    prompts: list[str]
    num_images: int
    seed: int
    batch_size: int
    settings: DrawSettings
    precision: str = "no"
    plan: SkipPlan | None = None
    timing: LoraTiming | None = None


def draw_to_folder(job: SampleJob, out: Path, *, reporter: Reporter, world: World = SINGLE) -> list[Path]:
    """Write ``00000.png`` …, prompts outermost, each with A1111's text; return the images.

    The processes of ``world`` draw batches in turn into the folder they share.
    """
    reporter.note(overview(job))
    device, dtype = pick_device(), dtype_of(job.precision)
    family = load_family(job.model, dtype=dtype)
    if job.lora is not None:
        family.load_lora(job.lora, scale=job.lora_scale)
        if job.timing is not None:
            check_timed(family, job.lora, job.timing)
    for sentence in drawing_notes(family, job.prompts, job.settings):
        reporter.note(sentence)
    settings, skips = job.settings, None
    if job.plan is not None:
        settings = with_plan(settings, job.plan)
        skips = skips_of(job.plan, family, settings)
        told = other_weights(job.plan, family)
        if told:
            reporter.note(told)
    embed = PromptEmbeddings(family)
    embed.prepare(job.prompts, job.settings.negative_prompt, device)
    family.to(device, dtype)
    pairs = [prompt for prompt in job.prompts for _ in range(job.num_images)]
    reporter.phase("images", len(pairs))

    lora = lora_tags(job.lora, job.lora_scale if job.timing is None else job.timing.start)
    solver = solver_of(family, job.settings)
    files = [out / f"{j:05d}.png" for j in range(len(pairs))]
    batches = torch.arange(len(pairs)).split(job.batch_size)
    for round_ in world.rounds(len(batches)):
        for number in filter(world.mine, round_):
            which = batches[number].tolist()
            images = _draw(family, embed, replace(job, settings=settings), [pairs[j] for j in which], which[0], skips)
            for j, image in zip(which, images, strict=True):
                how = parameters_text(
                    pairs[j], job.seed + j, settings, solver, job.model.model, image, lora, job.plan, job.timing
                )
                save_image(image, files[j], png_note(how))
        reporter.advance(sum(len(batches[number]) for number in round_))
    return files


def overview(job: SampleJob) -> str:
    """Model, device, threads, and what is drawn, in one line."""
    count, steps = len(job.prompts) * job.num_images, job.settings.num_inference_steps
    lora = f" with {job.lora}" if job.lora is not None else ""
    return f"{job.model.model}{lora} on {described()}; {count} image{'s' * (count != 1)} of {steps} steps"


def _draw(
    family: Family, embed: PromptEmbeddings, job: SampleJob, prompts: list[str], first: int, skips: Skips | None
) -> torch.Tensor:
    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(job.seed + first + j)

    network_for = None
    if job.timing is not None and job.lora is not None:
        shares = job.timing.shares(job.settings.num_inference_steps, make_route(family, job.settings).calls)
        network_for = partial(TimedNetwork, family, shares)
    parts = draw_images(
        family,
        prompts,
        generator_for,
        job.settings,
        batch_size=len(prompts),
        embed=embed,
        skips=skips,
        network_for=network_for,
    )
    return torch.cat(list(parts))
