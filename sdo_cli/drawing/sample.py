"""What `sdo sample` does: load, draw, write files."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, draw_images, solver_of
from sdo_cli.drawing.parameters import lora_name, parameters_text, png_note
from sdo_cli.drawing.pictures import save_grid, save_image
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.progress import Reporter


@dataclass(frozen=True)
class SampleJob:
    """Attributes:
    model: weights to draw with.
    lora: run folder or file, None for the plain model.
    seed: image j (over all prompts and copies) starts from ``manual_seed(seed + j)``.
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


def draw_to_folder(job: SampleJob, out: Path, *, grid: bool, reporter: Reporter) -> list[Path]:
    """Write ``00000.png`` …, prompts outermost, each with A1111's text; with ``grid`` a sheet; return the images."""
    device, dtype = pick_device(), dtype_of(job.precision)
    family = load_family(job.model, dtype=dtype)
    if job.lora is not None:
        family.load_lora(job.lora, scale=job.lora_scale)
    embed = PromptEmbeddings(family)
    embed.prepare(job.prompts, job.settings.negative_prompt, device)
    family.to(device, dtype)
    pairs = [prompt for prompt in job.prompts for _ in range(job.num_images)]
    reporter.phase("images", len(pairs))

    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(job.seed + j)

    lora = (lora_name(job.lora), job.lora_scale) if job.lora is not None else None
    solver = solver_of(family, job.settings)
    files: list[Path] = []
    kept = []
    for images in draw_images(family, pairs, generator_for, job.settings, batch_size=job.batch_size, embed=embed):
        for image in images:
            files.append(out / f"{len(files):05d}.png")
            prompt, seed = pairs[len(files) - 1], job.seed + len(files) - 1
            how = parameters_text(prompt, seed, job.settings, solver, job.model.model, image, lora)
            save_image(image, files[-1], png_note(how))
        kept.append(images)
        reporter.advance(len(images))
    if grid:
        rows = torch.cat(kept).split(job.num_images)
        save_grid(list(rows), job.prompts, out / "grid.png")
    return files
