"""`sdo sample`."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdo_cli.cli.drawing import drawing_problems
from sdo_cli.cli.output import make_reporter
from sdo_cli.cli.several import in_several_processes
from sdo_cli.device import PRECISIONS
from sdo_cli.errors import Interrupted, RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.parallel.launch import launched
from sdo_cli.runs.read import pipeline_of
from sdo_cli.sampling.solvers import AUTO, SOLVERS

if TYPE_CHECKING:
    from sdo_cli.skipping.skip_plan import SkipPlan


def sample(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="A file with a prompt a line, or a shipped list.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="embedded, a diffusers folder, a .safetensors checkpoint, a hub id.")
    ] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="fp16: weight files of that name.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: a folder or hub id.")] = None,
    t5: Annotated[bool, typer.Option(help="The third text encoder of SD 3.")] = True,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, if the config is wrong.")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"What the model computes in: {', '.join(PRECISIONS)}.")] = "no",
    lora: Annotated[str | None, typer.Option(help="A run folder or a LoRA file.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Weight of the LoRA; 0 is without.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Image j starts from torch.Generator('cpu').manual_seed(seed + j).")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images per prompt.")] = 1,
    steps: Annotated[int, typer.Option("--steps", help="num_inference_steps.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="guidance_scale; 1 is without.")] = 7.5,
    solver: Annotated[str, typer.Option(help=f"{AUTO}, or {', '.join(SOLVERS)}.")] = AUTO,
    eta: Annotated[float, typer.Option(help="DDIM's noise, 0 to 1.")] = 0.0,
    negative_prompt: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    skip_plan: Annotated[
        Path | None, typer.Option(help="Of `sdo prune`: what to leave out; it says --steps and --solver.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    variables: Annotated[
        Path | None, typer.Option(help="Of `sdo optimize`: draw these images again; the file says everything else.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="So many processes on this machine, a GPU each.")] = None,
    processes: Annotated[int | None, typer.Option(help="So many processes on the CPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the images; default samples/<time>.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also one picture of all, a row per prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Draw images, with or without a LoRA."""
    if variables is not None:
        draw_again(context, variables, out, grid=grid, as_json=as_json, quiet=quiet)
        return
    lines = gather_prompts(prompts or [], prompts_file)
    count = len(lines) * num_images
    wrong = [] if 1 <= num_images <= 10**6 else [f"--num-images: must be between 1 and {10**6}, not {num_images}"]
    wrong += drawing_problems(
        steps=steps,
        guidance=guidance,
        lora_scales=[lora_scale],
        eta=eta,
        batch_size=batch_size,
        seed=seed,
        count=count,
        solver=solver,
        precision=precision,
        prediction_type=prediction_type,
        height=height,
        width=width,
    )
    if lora is not None and (whole := pipeline_of(Path(lora).expanduser())) is not None:
        wrong.append(f"--lora {lora}: all weights were trained in this run; draw with --model {whole}")
    folder = out or Path("samples") / time.strftime("%Y%m%d-%H%M%S")
    # of several processes one may have begun already
    if wrong := [*wrong, *([] if launched() else holds_images(folder))]:
        raise RecipeFault(wrong, what="command line")

    plan = None
    if skip_plan is not None:
        plan, steps, solver = plan_and_steps(context, skip_plan, steps, solver)
    in_several_processes(gpus, processes)
    from sdo_cli.drawing.draw import DrawSettings
    from sdo_cli.drawing.sample import SampleJob, draw_to_folder
    from sdo_cli.models.load import ModelSource
    from sdo_cli.parallel.world import joined

    settings = DrawSettings(solver, eta, steps, guidance, negative_prompt, height, width)
    source = ModelSource(model, revision, variant, vae, t5, prediction_type)
    job = SampleJob(source, lora, lora_scale, lines, num_images, seed, batch_size, settings, precision, plan)
    with joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        if problem := world.share(lambda: holds_images(folder)):
            raise RecipeFault(problem, what="command line")
        reporter = make_reporter(as_json=as_json, quiet=quiet or not world.is_main)
        try:
            files = draw_to_folder(job, folder, grid=grid, reporter=reporter, world=world)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what was drawn is in {folder}/") from None
        finally:
            reporter.close()
        if not world.is_main:
            return
    show_files(files, folder, grid=grid, as_json=as_json)


def show_files(files: list[Path], folder: Path, *, grid: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(
            json.dumps({"images": [str(path) for path in files], "grid": str(folder / "grid.png") if grid else None})
        )
    else:
        also = " and grid.png" if grid else ""
        typer.echo(f"{folder}/: {', '.join(path.name for path in files[:3])}{' …' if len(files) > 3 else ''}{also}")


def draw_again(
    context: typer.Context, variables: Path, out: Path | None, *, grid: bool, as_json: bool, quiet: bool
) -> None:
    """The images of a file of `sdo optimize`.

    Raises:
        RecipeFault: other options, which the file would contradict.
    """
    free = ("variables", "out", "grid", "as_json", "quiet")
    given = [name for name in context.params if name not in free and _was_typed(context, name)]
    wrong = [f"--{name.replace('_', '-')}: the file of --variables says it; leave it out" for name in given]
    folder = out or Path("samples") / time.strftime("%Y%m%d-%H%M%S")
    if wrong := [*wrong, *holds_images(folder)]:
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.optimize.render import render_file

    reporter = make_reporter(as_json=as_json, quiet=quiet)
    try:
        files = render_file(variables, folder, grid=grid, reporter=reporter)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was drawn is in {folder}/") from None
    finally:
        reporter.close()
    show_files(files, folder, grid=grid, as_json=as_json)


def plan_and_steps(context: typer.Context, path: Path, steps: int, solver: str) -> "tuple[SkipPlan, int, str]":
    """The plan, and the steps and solver it was made for.

    Raises:
        RecipeFault: other ones were typed.
    """
    from sdo_cli.skipping.skip_plan import load_plan

    plan = load_plan(path)
    mine = {"steps": steps, "solver": solver}
    its = {"steps": plan.made_for.num_inference_steps, "solver": plan.made_for.solver}
    wrong = [
        f"--{name} {mine[name]}: {path} was made for {its[name]}; leave it out"
        for name in its
        if _was_typed(context, name) and mine[name] not in (its[name], AUTO)
    ]
    if wrong:
        raise RecipeFault(wrong, what="command line")
    return plan, plan.made_for.num_inference_steps, plan.made_for.solver


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def holds_images(folder: Path) -> list[str]:
    """What is wrong with drawing into ``folder``."""
    if any(folder.glob("[0-9]*.png")):
        return [f"--out {folder}: holds images already; give another folder, nothing is overwritten"]
    return []


def gather_prompts(words: list[str], prompts_file: str | None) -> list[str]:
    from sdo_cli.recipe.prompts import read_prompts
    from sdo_cli.recipe.schema import PromptSource

    lines = [word for word in words if word.strip()]
    if prompts_file:
        try:
            lines += read_prompts(PromptSource(file=prompts_file), None)
        except ValueError as fault:
            raise RecipeFault([f"--prompts-file: {fault}"], what="command line") from fault
    if not lines:
        raise RecipeFault(
            [f"no prompt; write one in quotes: {sdo('sample', 'a tiger on a teal background')}"], what="command line"
        )
    return lines
