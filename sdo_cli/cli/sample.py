"""`sdo sample`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdo_cli.cli.drawing import (
    BARE,
    ETA,
    TIMESTEPS,
    PlainModel,
    PlainPicture,
    laid_over,
    with_timesteps,
)
from sdo_cli.cli.from_run import FromRun, first_prompts, laid_over_run, start_from, typed_in
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.cli.sample_grid import (
    ALONE,
    BATCH,
    TOGETHER,
    GridOptions,
    ListedLoras,
    ListedSolver,
    as_in,
    layout_of,
    listed,
    seeds_of,
    values_of,
)
from sdo_cli.cli.several import ProcessOptions, in_several_processes
from sdo_cli.errors import Interrupted, RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.models.lora_stack import stack_of
from sdo_cli.parallel.launch import launched
from sdo_cli.progress import Reporter
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.runs.read import pipeline_of
from sdo_cli.sampling.solvers import AUTO

if TYPE_CHECKING:
    from sdo_cli.drawing.grid import GridJob
    from sdo_cli.drawing.sample import SampleJob
    from sdo_cli.skipping.skip_plan import SkipPlan


@dataclass(frozen=True)
class TargetOptions:
    out: Annotated[Path | None, typer.Option(help="Folder for the images; default samples/<time>.")] = None
    grid: Annotated[
        bool, typer.Option("--grid", help="Also one picture of all: what varies in named rows and columns.")
    ] = False

    def folder(self) -> Path:
        return self.out or Path("samples") / time.strftime("%Y%m%d-%H%M%S")


@grouped
def sample(
    context: typer.Context,
    *,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="A file with a prompt a line, or a shipped list.")] = None,
    model: PlainModel,
    lora: ListedLoras,
    seed: Annotated[
        int, typer.Option(help="Image j starts from torch.Generator('cpu').manual_seed(seed + j); see --seeds.")
    ] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images per prompt.")] = 1,
    solver: ListedSolver,
    eta: Annotated[float, ETA] = 0.0,
    timesteps: Annotated[str | None, TIMESTEPS] = None,
    picture: PlainPicture,
    skip_plan: Annotated[
        Path | None, typer.Option(help="Of `sdo prune`: what to leave out; it says --steps and --solver.")
    ] = None,
    batch_size: Annotated[int | None, BATCH] = None,
    variables: Annotated[
        Path | None, typer.Option(help="Of `sdo optimize`: draw these images again; the file says everything else.")
    ] = None,
    processes: ProcessOptions,
    target: TargetOptions,
    sides: GridOptions,
    output: OutputOptions,
) -> None:
    """Draw images, with or without a LoRA, or several side by side."""
    if variables is not None:
        draw_again(context, variables, target, output)
        return
    typed = typed_in(context)
    start = None if lora_problems(lora) else start_from(lora.lora or [], model.model if "model" in typed else None)
    lines, notes = gather_prompts(prompts or [], prompts_file, start)
    wrong: list[str] = []
    if start is not None:
        solver = as_in(start.loaded.recipe, solver, typed)
    numbers = listed(lora, solver, grid=target.grid, wrong=wrong)
    asked = laid_over(BARE, model, numbers.first(solver.solver), picture, eta=eta)
    if start is not None:
        groups = (model, numbers.first(solver.solver), picture)
        asked, said = laid_over_run(start.loaded.recipe, typed, groups, eta=eta)
        notes = [*start.notes, *([said] if said else []), *notes]
    asked = with_timesteps(asked, timesteps, asked.num_inference_steps if "steps" in typed else None)
    wrong += [] if 1 <= num_images <= 10**6 else [f"--num-images: must be between 1 and {10**6}, not {num_images}"]
    seeds = seeds_of(sides, seed, num_images, grid=target.grid, counted="num_images" in typed, wrong=wrong)
    size = batch_size if batch_size is not None else ALONE if target.grid else TOGETHER
    count = len(lines) * num_images if seeds is None else len(seeds)
    wrong += numbers.problems(asked, batch_size=size, seed=seed, count=count)
    wrong += numbers.fixed_by({"skip-plan": skip_plan, "timesteps": timesteps})
    wrong += lora_problems(lora)
    wrong += lora.timing_problems(asked.num_inference_steps, alone=seeds is None, plan=skip_plan is not None)
    values = values_of(lines, lora, numbers, seeds or [seed], side_by_side=target.grid)
    layout_of(values, sides, grid=target.grid, wrong=wrong)
    folder = target.folder()
    # of several processes one may have begun already
    if wrong := [*wrong, *([] if launched() else holds_images(folder))]:
        raise RecipeFault(wrong, what="command line")
    plan = None
    if skip_plan is not None:
        plan, asked = plan_and_settings(context, skip_plan, asked)
    in_several_processes(processes)
    from sdo_cli.drawing.draw import draw_settings
    from sdo_cli.drawing.grid import GridJob
    from sdo_cli.drawing.lora_timing import LoraTiming
    from sdo_cli.drawing.sample import SampleJob
    from sdo_cli.models.load import source_of

    job: SampleJob | GridJob
    how = draw_settings(asked)
    if seeds is None:
        stack, scale, timing = lora.at_once.stack, numbers.scales[0], None
        if lora.lora_from_step is not None or lora.lora_scale_end is not None:
            end = scale if lora.lora_scale_end is None else lora.lora_scale_end
            timing = LoraTiming(lora.lora_from_step or 0, scale, end)
            scale = timing.loaded
        job = SampleJob(
            source_of(asked), stack, scale, lines, num_images, seed, size, how, asked.mixed_precision, plan, timing
        )  # fmt: skip
    else:
        if len(values.steps) == 1:
            # what timesteps and skip plans say
            values = replace(values, steps=(asked.num_inference_steps,))
        layout = layout_of(values, sides, grid=target.grid, wrong=[])
        job = GridJob(source_of(asked), values, layout, size, how, asked.mixed_precision, plan)
    draw(job, folder, output=output, notes=[*lora.note(side_by_side=target.grid), *notes])


def draw(job: "SampleJob | GridJob", folder: Path, *, output: OutputOptions, notes: list[str]) -> None:
    """Together with the other processes; the first one says where the images are."""
    from sdo_cli.drawing.grid import GridJob, draw_cells
    from sdo_cli.drawing.sample import draw_to_folder
    from sdo_cli.parallel.world import joined

    with joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        if problem := world.share(lambda: holds_images(folder)):
            raise RecipeFault(problem, what="command line")
        with told(folder, output.reporter(talks=world.is_main)) as reporter:
            for note in notes:
                reporter.note(note)
            if isinstance(job, GridJob):
                files, sheets = draw_cells(job, folder, reporter=reporter, world=world)
            else:
                files, sheets = draw_to_folder(job, folder, reporter=reporter, world=world), []
        if not world.is_main:
            return
    show_files(files, folder, sheets=sheets, as_json=output.as_json)


@contextmanager
def told(folder: Path, reporter: Reporter) -> Iterator[Reporter]:
    """Progress that ends well; raises Interrupted for Ctrl-C."""
    try:
        yield reporter
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was drawn is in {folder}/") from None
    finally:
        reporter.close()


def lora_problems(lora: ListedLoras) -> list[str]:
    return [
        f"--lora {one.path}: all weights were trained in this run; draw with --model {whole}"
        for word in lora.lora or ()
        for one in stack_of(word)
        if (whole := pipeline_of(Path(one.path).expanduser())) is not None
    ]


def show_files(files: list[Path], folder: Path, *, sheets: list[Path], as_json: bool) -> None:
    names = [str(path) for path in sheets]
    if as_json:
        first = names[0] if names else None
        typer.echo(json.dumps({"images": [str(path) for path in files], "grid": first, "grids": names}))
        return
    also = f" and {sheets[0].name}" if len(sheets) == 1 else ""
    if len(sheets) > 1:
        also = f" and {len(sheets)} sheets, {sheets[0].name} to {sheets[-1].name}"
    typer.echo(f"{folder}/: {', '.join(path.name for path in files[:3])}{' …' if len(files) > 3 else ''}{also}")


def draw_again(context: typer.Context, variables: Path, target: TargetOptions, output: OutputOptions) -> None:
    """The images of a file of `sdo optimize`.

    Raises:
        RecipeFault: other options, which the file would contradict.
    """
    free = {"variables", *(field.name for group in (target, output) for field in fields(group))}
    given = [name for name in context.params if name not in free and name in typed_in(context)]
    wrong = [f"--{name.replace('_', '-')}: the file of --variables says it; leave it out" for name in given]
    folder = target.folder()
    if wrong := [*wrong, *holds_images(folder)]:
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.steering.render import render_file

    with told(folder, output.reporter()) as reporter:
        files = render_file(variables, folder, grid=target.grid, reporter=reporter)
    sheets = [folder / "grid.png"] if target.grid else []
    show_files(files, folder, sheets=sheets, as_json=output.as_json)


def plan_and_settings(context: typer.Context, path: Path, asked: Recipe) -> "tuple[SkipPlan, Recipe]":
    """The plan, and the settings with the steps and solver it was made for.

    Raises:
        RecipeFault: other ones were typed.
    """
    from sdo_cli.skipping.skip_plan import load_plan

    plan = load_plan(path)
    mine = {"steps": asked.num_inference_steps, "solver": asked.solver}
    its = {"steps": plan.made_for.num_inference_steps, "solver": plan.made_for.solver}
    wrong = [f"--timesteps: {path} was made for steps of its own; leave it out"] if asked.timesteps is not None else []
    wrong += [
        f"--{name} {mine[name]}: {path} was made for {its[name]}; leave it out"
        for name in its
        if name in typed_in(context) and mine[name] not in (its[name], AUTO)
    ]
    if wrong:
        raise RecipeFault(wrong, what="command line")
    return plan, replace(asked, num_inference_steps=plan.made_for.num_inference_steps, solver=plan.made_for.solver)


def holds_images(folder: Path) -> list[str]:
    """What is wrong with drawing into ``folder``."""
    if any(folder.glob("[0-9]*.png")):
        return [f"--out {folder}: holds images already; give another folder, nothing is overwritten"]
    return unwritable(folder)


def gather_prompts(
    words: list[str], prompts_file: str | None, start: FromRun | None = None
) -> tuple[list[str], list[str]]:
    """Prompts, and sentences on what their file leaves out; where none is named, the run's first held-out ones."""
    from sdo_cli.recipe.prompts import prompt_notes, read_prompts

    lines, notes = [word for word in words if word.strip()], []
    if prompts_file:
        try:
            lines += read_prompts(PromptSource(file=prompts_file), None)
            notes = prompt_notes(PromptSource(file=prompts_file), None)
        except ValueError as fault:
            raise RecipeFault([f"--prompts-file: {fault}"], what="command line") from fault
    if not lines and start is not None:
        lines, note = first_prompts(start.loaded)
        notes = [note] if note else []
    if not lines and start is not None:
        raise RecipeFault(
            [f"no prompt, and {start.folder} has no held-out ones; write one in quotes"], what="command line"
        )
    if not lines:
        raise RecipeFault(
            [f"no prompt; write one in quotes: {sdo('sample', 'a tiger on a teal background')}"], what="command line"
        )
    return lines, notes
