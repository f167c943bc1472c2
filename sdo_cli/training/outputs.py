"""Weights, pictures and results of a run: what its folder keeps for the user. Only the first process writes."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.drawing.pictures import read_image, save_grid, save_image
from sdo_cli.files import read_json, write_json, write_text
from sdo_cli.models.lora_paths import BEST, CHECKPOINTS
from sdo_cli.parallel.shards import whole
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.records.step import StepResult
from sdo_cli.reports.page import write_report
from sdo_cli.runs.card import curve_png, model_card
from sdo_cli.runs.read import PIPELINE
from sdo_cli.runs.report import run_report
from sdo_cli.runs.summary import RunSummary
from sdo_cli.training.guard import Guard
from sdo_cli.training.job import Job
from sdo_cli.training.prepare import fresh_family
from sdo_cli.training.validate import Validation

LIVE_SECONDS = 30
# writes a LoRA's other formats into the folder that holds diffusers' file
Also = Callable[[Path], None] | None


def scores_before(
    job: Job, validation: Validation | None, folder: Path, reporter: Reporter, *, resumed: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Held-out scores and pictures of the untrained model; of a resumed run those it began with."""
    kept = folder / CHECKPOINTS / "before.json"
    if resumed and job.world.share(kept.is_file):
        scores = {name: torch.tensor(rows) for name, rows in job.world.share(lambda: read_json(kept)).items()}
        pictures = sorted((folder / "samples" / "step_000000").glob("[0-9]*.png")) if job.world.is_main else []
        return scores, torch.stack([read_image(path) for path in pictures]) if pictures else None
    before = measure(job, validation, "held-out, before", reporter)
    grid = draw_grid(job, validation, None, folder, 0)
    if job.recipe.checkpointing_steps and job.world.is_main:
        write_json(kept, {name: rows.tolist() for name, rows in before.items()})
    return before, grid


@dataclass
class Guided:
    """The untrained model with guidance, where it is to be compared with: scores and grid pictures; empty without."""

    scale: float = 0.0
    scores: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None

    @property
    def label(self) -> str:
        return f"before, guidance {self.scale:g}"


def guided_before(
    job: Job, validation: Validation | None, folder: Path, reporter: Reporter, *, resumed: bool
) -> Guided:
    """Of the untrained model, or what a resumed run found."""
    scale = job.recipe.validation.base_guidance_scale
    if scale is None or validation is None:
        return Guided()
    kept, stage = folder / CHECKPOINTS / "guided.json", folder / "samples" / "guided"
    if resumed and job.world.share(kept.is_file):
        scores = {name: torch.tensor(rows) for name, rows in job.world.share(lambda: read_json(kept)).items()}
        pictures = sorted(stage.glob("[0-9]*.png")) if job.world.is_main else []
        return Guided(scale, scores, torch.stack([read_image(path) for path in pictures]) if pictures else None)
    beside = replace(validation, settings=replace(validation.settings, guidance_scale=scale))
    scores = measure(job, beside, f"held-out, before, guidance {scale:g}", reporter)
    count = min(job.recipe.validation.grid_prompts, len(validation.prompts))
    images = beside.draw(job.family, range(0, count * beside.seeds, beside.seeds)) if count else None
    if job.world.is_main:
        for index, image in enumerate(images if images is not None else ()):
            save_image(image, stage / f"{index:05d}.png")
        if job.recipe.checkpointing_steps:
            write_json(kept, {name: rows.tolist() for name, rows in scores.items()})
    return Guided(scale, scores, images)


def measure(job: Job, validation: Validation | None, name: str, reporter: Reporter) -> dict[str, Tensor]:
    if validation is None:
        return {}
    reporter.phase(name, len(validation.pairs))
    return validation.measure(job.family, reporter)


def draw_grid(
    job: Job,
    validation: Validation | None,
    first: Tensor | None,
    folder: Path,
    step: int,
    guided: Guided | None = None,
) -> Tensor | None:
    """Draw the grid prompts; save each alone, and all under the images from before training, and return them.

    Args:
        guided: a third row.
    """
    count = min(job.recipe.validation.grid_prompts, len(validation.prompts) if validation else 0)
    if validation is None or count == 0:
        return None
    images = validation.draw(job.family, range(0, count * validation.seeds, validation.seeds))
    if not job.world.is_main:
        return images
    rows, labels = ([images], ["before"]) if first is None else ([first, images], ["before", f"step {step}"])
    if guided is not None and guided.images is not None:
        rows, labels = [*rows, guided.images], [*labels, guided.label]
    stage = folder / "samples" / f"step_{step:06d}"
    for index, image in enumerate(images):
        save_image(image, stage / f"{index:05d}.png")
    save_grid(rows, labels, stage / "grid.png", captions=validation.prompts[:count])
    return images


def write_results(
    job: Job,
    loaded: LoadedRecipe,
    validation: Validation | None,
    summary: RunSummary,
    results: list[StepResult],
    scores: dict[str, dict[str, Tensor]],
) -> None:
    """Curve, scores, report and card."""
    folder = summary.folder
    curve_png(results, folder / "reward_curve.png")
    if validation is not None:
        table = {when: {name: value.tolist() for name, value in rows.items()} for when, rows in scores.items()}
        write_json(folder / "validation.json", {"prompts": validation.prompts, **table})
    write_report(run_report(folder, "finished"), folder / "report.html")
    write_text(folder / "README.md", model_card(loaded, job.family, summary))


def write_live_report(folder: Path) -> None:
    """The page of a run that goes on, as far as it is."""
    write_report(replace(run_report(folder, "running"), refresh=LIVE_SECONDS), folder / "report.html")


def save_weights(job: Job, folder: Path, also: Also = None) -> None:
    """The adapter, or with ``train: full`` the whole pipeline; all processes add what they have of it."""
    if job.recipe.train == "full":
        weights = _whole_weights(job)
        if job.world.is_main:
            _save_pipeline(job, weights, folder / PIPELINE)
        return
    if not job.world.is_main:
        return
    partial = folder / ".partial-lora"
    write_adapter(job, partial, also)
    for path in sorted(partial.iterdir()):
        path.replace(folder / path.name)
    shutil.rmtree(partial)


def write_adapter(job: Job, folder: Path, also: Also) -> None:
    """The adapter as it is now: diffusers' file, and what is wanted beside it."""
    job.family.save_lora(folder)
    if also is not None:
        also(folder)


def _whole_weights(job: Job) -> dict[str, Tensor]:
    """The trained denoiser's; of one in shards, put together on the first process's CPU, tensor by tensor."""
    state: dict[str, Tensor] = job.family.denoiser.state_dict()
    if not job.world.sharded:
        return state
    found = {}
    for name, tensor in state.items():
        full = whole(tensor)
        if job.world.is_main:
            found[name] = full.cpu()
    return found


def _save_pipeline(job: Job, weights: dict[str, Tensor], folder: Path) -> None:
    """A whole pipeline with the trained denoiser; the parts that were freed are read again."""
    fresh = fresh_family(job.recipe)
    fresh.denoiser.load_state_dict(weights)
    partial = folder.with_name(".partial-pipeline")
    shutil.rmtree(partial, ignore_errors=True)
    fresh.save_pipeline(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def save_best(job: Job, guard: Guard, folder: Path, also: Also = None) -> None:
    """``best/``: the adapter of the best check, loadable like the run itself."""
    if guard.best is None or not job.world.is_main:
        return
    now = [parameter.detach().clone() for parameter in job.parameters]
    target, partial = folder / BEST, folder / f".partial-{BEST}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _put(job.parameters, guard.best)
        write_adapter(job, partial, also)
    finally:
        _put(job.parameters, now)
    check = next(check for check in guard.checks if check.step == guard.best_step)
    means = {name: sum(values) / len(values) for name, values in check.values.items()}
    write_json(partial / "best.json", {"step": guard.best_step, "chosen_by": guard.untrained, "measures": means})
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


@torch.no_grad()
def _put(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
