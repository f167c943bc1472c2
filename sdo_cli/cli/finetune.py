"""`sdo finetune`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdo_cli.cli.groups import grouped
from sdo_cli.cli.options import RecipeOptions, RulePlugins
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.cli.recorded import load_recorded_plugins
from sdo_cli.cli.several import ProcessOptions, in_several_processes, stopped_well
from sdo_cli.errors import EnvironmentFault, RecipeFault, SdoError, is_out_of_memory
from sdo_cli.installed import sdo
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.recipe.schema import Recipe
from sdo_cli.runs.again import check_places, load_run, resume_line
from sdo_cli.runs.read import PIPELINE, RECIPE, recipe_of

if TYPE_CHECKING:
    from sdo_cli.runs.summary import RunSummary


@grouped
def finetune(
    *,
    recipe: RecipeOptions,
    plugin: RulePlugins = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>-<time>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from a run's newest checkpoint: --resume runs/x, or the last run.")
    ] = False,
    time_limit: Annotated[
        str | None, typer.Option(metavar="H:MM:SS", help="Save and stop before so much time is over (exit code 75).")
    ] = None,
    processes: ProcessOptions,
    stop_on_overoptimisation: Annotated[
        bool, typer.Option("--stop-on-overoptimisation", help="guard.stop=true: end when untrained rewards fall.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and show the resolved recipe; run nothing.")] = False,
    output: OutputOptions,
) -> None:
    """Fine-tune a LoRA on the recipe's rewards."""
    overrides = [*recipe.overrides, *(["guard.stop=true"] if stop_on_overoptimisation else [])]
    loaded, out = asked_for(recipe.recipe, overrides, plugin or [], out, resume=resume)
    if dry_run:
        from sdo_cli.doctor.at_hand import problems_of

        if wrong := problems_of(loaded.recipe):
            raise RecipeFault(wrong)
        show_resolved(loaded, output.as_json)
        return
    seconds = None if time_limit is None else seconds_of(time_limit)
    in_several_processes(processes)
    from sdo_cli.exporting.export import kohya_writer
    from sdo_cli.models.load import source_of
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.parallel.world import joined
    from sdo_cli.runs.resume import finished
    from sdo_cli.training.run import finetune as run

    folder: Path | None = None
    more = [*processes.words, *(["--time-limit", time_limit] if time_limit else [])]
    with stopped_well(lambda: folder, line=lambda there: resume_line(there, *more)), joined(shards=True) as world:
        folder = Path(world.share(lambda: str(run_folder(loaded, out, resume=resume))))
        if resume and (how := world.share(lambda: finished(loaded, folder, world.size))):
            if world.is_main:
                typer.echo(f"{folder}/ is finished already; {how}")
            return
        also = kohya_writer(source_of(loaded.recipe), loaded.name) if loaded.recipe.lora.kohya else None
        reporter = output.reporter(talks=world.is_main)
        try:
            with Stopping(seconds, reporter.note, world) as stopping:
                summary = run(loaded, folder, reporter, resume=resume, stopping=stopping, world=world, also=also)
        except Exception as fault:
            if advice := out_of_memory(fault, loaded):
                raise advice from fault
            raise
        finally:
            reporter.close()
        if world.is_main:
            typer.echo(json.dumps(as_record(summary)) if output.as_json else as_text(loaded, summary))


def asked_for(
    recipe: str, overrides: list[str], plugins: list[Path], out: Path | None, *, resume: bool
) -> tuple[LoadedRecipe, Path | None]:
    """The recipe that is named, or of the run that is gone on with; and the folder, where that is settled.

    Raises:
        RecipeFault: neither is named.
    """
    folder = run_asked_for(recipe, out) if resume else None
    if folder is None and not recipe:
        shown = f"`{sdo('recipe', 'list')}` shows the shipped ones"
        raise RecipeFault([f"--recipe is missing; {shown}, try --recipe quickstart"])
    load_plugins(plugins)
    if folder is None:
        return load_recipe(recipe, overrides), out
    if out is not None and out.resolve() != folder.resolve():
        raise RecipeFault([f"--out {out}: the run goes on in its own folder, {folder}; leave --out out"])
    load_recorded_plugins(folder, plugins)
    loaded = load_run(folder, overrides)
    check_places(loaded.recipe, folder, how="say where it is, as key=PLACE (a file or folder of the same name)")
    return loaded, folder


def run_asked_for(recipe: str, out: Path | None) -> Path | None:
    """The run folder whose own recipe is meant; None where a recipe is named.

    Raises:
        RecipeFault: none is named, and there is no stopped run.
    """
    named = Path(recipe) if recipe else out
    if recipe and "/" in recipe and not Path(recipe).exists() and Path(recipe).suffix not in (".yaml", ".yml"):
        from sdo_cli.runs.table import runs_in

        there = ", ".join(str(run) for run in runs_in(Path(recipe).parent)) if Path(recipe).parent.is_dir() else ""
        raise RecipeFault(
            [f"--resume {recipe}: no such run; " + (f"there are {there}" if there else "name its folder")]
        )
    if recipe and not Path(recipe).is_dir():
        return None
    if named is not None:
        if recipe_of(named) is None:
            raise RecipeFault([f"{named}: is no run folder: it holds no {RECIPE}; name a run, or a recipe"])
        return named
    runs = Path(Recipe.output_dir)
    from sdo_cli.runs.resume import newest_run, newest_stopped

    if (found := newest_stopped(runs)) is None:
        last = newest_run(runs)
        more = f"; of a finished one take more steps by its name: --resume {last} max_train_steps=…" if last else ""
        raise RecipeFault([f"--resume: {runs}/ holds no run that was stopped; name a run folder, or a recipe{more}"])
    return found


def run_folder(loaded: LoadedRecipe, out: Path | None, *, resume: bool) -> Path:
    """A new folder, or with ``resume`` the one to go on with.

    Raises:
        RecipeFault: ``out`` is not empty.
    """
    if wrong := unwritable(out or Path(loaded.recipe.output_dir)):
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.runs.folder import new_run_folder
    from sdo_cli.runs.read import manifest_of
    from sdo_cli.runs.resume import newest_unfinished

    if resume and (found := out or newest_unfinished(loaded)) is not None:
        if out is not None and out.exists() and any(out.iterdir()) and not manifest_of(out):
            raise RecipeFault([f"--out {out}: is not empty and holds no run; give another folder"])
        return found
    try:
        return new_run_folder(loaded, out)
    except FileExistsError as fault:
        raise RecipeFault(
            [f"--out {fault}: is not empty; give a new folder, remove it first, or go on with it by --resume"]
        ) from fault


def out_of_memory(fault: Exception, loaded: LoadedRecipe) -> EnvironmentFault | None:
    """The estimator's advice for this recipe and device, when that is what happened; None for other faults."""
    if not is_out_of_memory(fault):
        return None
    from sdo_cli.doctor.advice import advise, estimate_recipe
    from sdo_cli.doctor.target import find_target

    target = find_target(None)
    what = f"{target.name} has not enough memory for this recipe"
    remedy = f"see what needs how much: {sdo('doctor', '--recipe', loaded.given)}"
    try:
        # it did not fit, whatever the estimate says: find what needs less
        needed = estimate_recipe(loaded, target)
        tight = replace(target, memory=min(target.memory, target.needed(int(0.85 * needed.peak))))
        if found := advise(loaded, tight, needed).overrides:
            remedy = f"try with {' '.join(found)}\n     {remedy}"
    except SdoError:
        pass
    return EnvironmentFault(what, remedy=remedy)


def seconds_of(text: str) -> float:
    """``3:50:00``, ``50:00`` or minutes alone, as Slurm writes them, to seconds.

    Raises:
        RecipeFault: none of these.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) > 3 or (dash and not days.isdigit()):
        raise RecipeFault([f"--time-limit: {text!r} is no time; write 3:50:00"], what="command line")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        # Slurm: minutes, or with days hours
        numbers = [numbers[0], 0, 0] if dash else [0, numbers[0], 0]
    elif len(numbers) == 2:
        numbers = [*numbers, 0] if dash else [0, *numbers]
    hours, minutes, seconds = numbers
    return (int(days or 0) * 24 + hours) * 3600.0 + minutes * 60 + seconds


def show_resolved(loaded: LoadedRecipe, as_json: bool) -> None:
    from omegaconf import OmegaConf

    tree = loaded.resolved()
    typer.echo(json.dumps(tree) if as_json else OmegaConf.to_yaml(OmegaConf.create(tree)).rstrip())
    for sentence in loaded.notes:
        typer.echo(f"# {sentence}", err=True)
    count = len(loaded.prompts(loaded.recipe.prompts))
    typer.echo(f"# {loaded.name}: no problems; {count} training prompts", err=True)


def as_record(summary: "RunSummary") -> dict[str, Any]:
    gains = {
        name: {
            "before": gain.before.mean,
            "after": gain.after.mean,
            "difference": gain.difference.mean,
            # JSON knows no NaN: one prompt has no standard error
            "standard_error": gain.difference.standard_error if gain.difference.n > 1 else None,
            "prompts": gain.difference.n,
        }
        for name, gain in summary.gains.items()
    }
    record = {"run": str(summary.folder), "steps": summary.steps, "gains": gains, "seconds": summary.seconds}
    return record | ({"guided": summary.guided} if summary.guided else {})


def as_text(loaded: LoadedRecipe, summary: "RunSummary") -> str:
    lines = [""]
    if summary.gains:
        count = next(iter(summary.gains.values())).difference.n
        lines.append(f"held-out prompts ({count}), same noise before and after:")
    for name, gain in summary.gains.items():
        role = "trained" if name in summary.trained_on else "only measured"
        change = f"{gain.difference.mean:+.4f} ± {gain.difference.standard_error:.4f}"
        lines.append(
            f"  {name:<12} {gain.before}  →  {gain.after}   {change} ({gain.times_its_error} standard errors; {role})"
        )
    if summary.guided:
        means = ", ".join(f"{name} {mean:.4f}" for name, mean in summary.guided.items())
        scale = loaded.recipe.validation.base_guidance_scale
        lines.append(f"  the untrained model with guidance {scale:g}: {means}")
    total = sum(summary.seconds.values()) or 1.0
    stages = ", ".join(f"{name} {value:.0f} s ({value / total:.0%})" for name, value in summary.seconds.items())
    folder, grid = summary.folder, f"samples/step_{summary.steps:06d}/grid.png"
    lines += [f"training time: {stages}", "", f"{folder}/"]
    if loaded.recipe.train == "full":
        lines.append("  pipeline/   load with DiffusionPipeline.from_pretrained()")
    else:
        lines.append("  pytorch_lora_weights.safetensors   load with pipe.load_lora_weights()")
    if (folder / "best").is_dir():
        lines.append(f"  best/   the adapter of step {summary.best_step}, which the rewards not trained on liked most")
    if (folder / grid).exists():
        lines.append(f"  {grid}   the same prompts and noise, before and after")
    lines.append("  report.html  reward_curve.png  README.md  metrics.jsonl")
    recipe = loaded.recipe
    example = (loaded.prompts(recipe.validation.prompts) if summary.gains else loaded.prompts(recipe.prompts))[0]
    # the folder says everything else
    tuned = ["--lora", str(folder)] if recipe.train == "lora" else ["--model", str(folder / PIPELINE)]
    lines += [f"\n{sentence}" for sentence in summary.too_few]
    lines += [f"\nlook at this: {sentence}" for sentence in summary.falls]
    lines += ["", "next:", f"  {sdo('sample', example, *tuned)}"]
    if recipe.train == "lora" and summary.gains:
        lines.append(f"  {sdo('eval', '--lora', folder, '--seeds', 2)}")
    return "\n".join(lines)
