"""`sdo sample --variables`: the images of a file of optimised variables, again."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.drawing.draw import encode_pair, solver_of
from sdo_cli.drawing.parameters import lora_tags, parameters_text, png_note
from sdo_cli.drawing.pictures import save_grid, save_image
from sdo_cli.progress import Reporter
from sdo_cli.recipe.steering import LoadedSteering
from sdo_cli.steering.job import Job, prepare, render
from sdo_cli.steering.variables import Canvas, State
from sdo_cli.steering.variables_file import read_variables


def render_file(path: Path, out: Path, *, grid: bool, reporter: Reporter) -> list[Path]:
    """Write ``00000.png`` …, computed together as they were when they were optimised: on the CPU bit for bit."""
    saved = read_variables(path)
    # nothing is scored: models of objectives are not loaded, and pictures are not looked for
    spec = replace(saved.spec, objectives=[], measures=[], images=[])
    job = replace(prepare(LoadedSteering(spec, str(path), "", Path(), saved.encoded)), prompts=saved.prompts)
    reporter.phase("images", len(job.prompts))
    files, every = [], []
    for which in job.groups():
        canvas = job.canvas(which)
        images = render(canvas, saved.state(which, plain_state(job, canvas)))
        files += save_images(job, images, which, out)
        every.append(images.cpu())
        reporter.advance(len(which))
    if grid:
        save_grid(list(torch.cat(every).split(8)), [""] * -(-len(files) // 8), out / "grid.png")
    return files


def plain_state(job: Job, canvas: Canvas) -> State:
    """Condition and scale of the prompts; the latent is only a place for one."""
    condition, _ = encode_pair(job.embed, job.settings, canvas.prompts)
    shape = job.family.latent_shape(job.settings.height, job.settings.width)
    latent = torch.zeros(len(canvas.prompts), *shape, device=job.family.device)
    scale = latent.new_full((1, len(latent)), job.settings.guidance_scale)
    noise = torch.zeros(canvas.route.calls, *latent.shape, device=latent.device) if canvas.route.takes_noise else None
    return State(latent, {key: value[None] for key, value in condition.items()}, scale, noise)


def save_images(job: Job, images: Tensor, which: range, folder: Path, *, steered: bool = True) -> list[Path]:
    """PNG files by number, with how they were made; only the variables themselves make a steered one again."""
    spec, files = job.spec, []
    lora = lora_tags(spec.lora, spec.lora_scale)
    solver = solver_of(job.family, job.settings)
    for j, image in zip(which, images, strict=True):
        how = parameters_text(job.prompts[j], spec.seed + j, job.settings, solver, spec.model, image, lora)
        path = folder / f"{j:05d}.png"
        save_image(image, path, png_note(f"{how}, Steered: {'+'.join(spec.variables)}" if steered else how))
        files.append(path)
    return files
