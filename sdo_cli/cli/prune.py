"""`sdo prune`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdo_cli.cli.drawing import (
    BARE,
    PRECISION,
    LoraOptions,
    PlainPicture,
    PlainWeights,
    drawing_problems,
    laid_over,
)
from sdo_cli.cli.from_run import laid_over_run, start_from, typed_in
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.options import RewardPlugins
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.cli.prune_options import (
    FullSampler,
    MeasureOptions,
    PlanOptions,
    SearchOptions,
    file_problems,
    measured_prompts,
    problems,
    reward_specs,
    search_prompts,
)
from sdo_cli.cli.recorded import load_plugins_for
from sdo_cli.cli.several import ProcessOptions, in_several_processes, stopped_well
from sdo_cli.errors import RecipeFault, Stopped
from sdo_cli.installed import sdo
from sdo_cli.parallel.launch import launched
from sdo_cli.plugins import load_plugins

# options of both commands; steps and solver are the plan's
AS_IN_SAMPLE = ("model", "revision", "variant", "lora", "lora_scale", "guidance", "negative_prompt", "height", "width")

if TYPE_CHECKING:
    from sdo_cli.prune.job import PruneJob
    from sdo_cli.prune.measure import ArmMeasures


@grouped
def prune(
    context: typer.Context,
    *,
    plan: PlanOptions,
    weights: PlainWeights,
    lora: LoraOptions,
    precision: Annotated[str, PRECISION] = "no",
    sampler: FullSampler,
    picture: PlainPicture,
    search: SearchOptions,
    measure: MeasureOptions,
    plugin: RewardPlugins = None,
    seed: Annotated[int, typer.Option(help="Of the search and of the noise that is measured on.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default prunes/<method>-<time>.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on in --out; what is in the middle (a sampler's measures, a schedule) begins anew.",
        ),
    ] = False,
    processes: ProcessOptions,
    output: OutputOptions,
) -> None:
    """Find which blocks of which steps can be skipped, and measure what that saves and costs."""
    asked, notes = laid_over(BARE, weights, sampler, picture, precision=precision), list[str]()
    typed = typed_in(context)
    load_plugins(plugin or ())
    if (start := start_from(lora.lora or [], weights.model if "model" in typed else None)) is not None:
        own = start.loaded.recipe
        asked, said = laid_over_run(own, typed, (weights, sampler, picture), precision=precision)
        notes = [*start.notes, *([said] if said else [])]
        load_plugins_for(measure.reward or [], start.folder, own, plugin or ())
        # plans are made for steps by their number
        asked = replace(asked, timesteps=None)
    wrong = problems(plan, search, measure, steps=asked.num_inference_steps)
    wrong += drawing_problems(
        asked,
        lora_scales=[lora.lora_scale],
        batch_size=measure.batch_size,
        seed=seed,
        count=measure.num_prompts,
    )
    wrong += file_problems(plan, search)
    specs = reward_specs(measure.reward or [], asked.model, wrong)
    if start is not None and plan.prompts_file is None:
        prompts = list(dict.fromkeys(start.loaded.prompts(start.loaded.recipe.prompts)))
        notes.append(f"no --prompts: the {len(prompts)} the run was trained on")
    else:
        prompts = search_prompts(plan.prompts_file, wrong)
    measured, kept = measured_prompts(prompts, measure.measure_on, measure.num_prompts, wrong)
    folder = out or Path("prunes") / f"{plan.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume and out is None:
        wrong.append("--resume: says to go on with --out FOLDER; name it")
    # of several processes one may have begun already
    if wrong := [*wrong, *([] if resume or launched() else full(folder))]:
        raise RecipeFault(wrong, what="command line")
    in_several_processes(processes)
    from sdo_cli.drawing.draw import draw_settings
    from sdo_cli.models.load import source_of
    from sdo_cli.prune.job import MeasureSettings, PruneJob

    job = PruneJob(
        source_of(asked),
        asked.mixed_precision,
        draw_settings(asked),
        plan.method,
        plan.ratios(asked.num_inference_steps),
        plan.grain,
        kept,
        search.settings(asked.num_inference_steps),
        MeasureSettings(measured, specs, measure.controls, measure.rounds, measure.batch_size),
        seed,
        lora.stack,
        lora.lora_scale,
        search.scores,
        search.schedule,
        search.solver_settings(),
        search.segment_settings(),
    )
    carry_out(job, folder, output, notes, drawn_by(context, (prompts or kept)[:1]), resume=resume)


def drawn_by(context: typer.Context, prompts: list[str]) -> list[str]:
    """What is typed after `sdo sample` for a picture of the same model, drawn in the same way."""
    words = list(prompts)
    for name in typed_in(context):
        if name in AS_IN_SAMPLE:
            value = context.params[name]
            for one in value if isinstance(value, list | tuple) else [value]:
                words += ["--" + name.replace("_", "-"), str(one)]
    return words


def full(folder: Path) -> list[str]:
    """What is wrong with beginning in ``folder``."""
    if folder.is_dir() and any(folder.iterdir()):
        return [f"--out {folder}: is not empty; give another folder, or go on with it by --resume"]
    return unwritable(folder)


def carry_out(
    job: "PruneJob", folder: Path, output: OutputOptions, notes: list[str], drawn: list[str], *, resume: bool
) -> None:
    """Together with the other processes; the first one shows the result."""
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.parallel.world import joined
    from sdo_cli.prune.run import identity
    from sdo_cli.prune.run import prune as run
    from sdo_cli.prune.scores import SCORES
    from sdo_cli.runs.kept import status_in

    with stopped_well(lambda: folder, "--resume"), joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        if not resume and (wrong := world.share(lambda: full(folder))):
            raise RecipeFault(wrong, what="command line")
        if resume and world.share(lambda: status_in(folder, identity(job))) == "finished":
            if world.is_main:
                typer.echo(f"{folder}/ is finished already")
            return
        reporter = output.reporter(talks=world.is_main)
        for sentence in notes:
            reporter.note(sentence)
        try:
            with Stopping(None, reporter.note, world) as stopping:
                found = run(job, folder, reporter, stopping=stopping, world=world)
        except Stopped:
            if (folder / SCORES).exists():
                reporter.note(f"its scores so far can be used: --scores {folder}")
            raise
        finally:
            reporter.close()
        if world.is_main:
            show(job, found, folder, output, drawn)


def show(job: "PruneJob", found: "list[ArmMeasures]", folder: Path, output: OutputOptions, drawn: list[str]) -> None:
    from sdo_cli.prune.tables import table

    plans = sorted(str(path) for path in folder.glob("plan-*.json"))
    if output.as_json:
        typer.echo(json.dumps({"folder": str(folder), "plans": plans}))
        return
    if found:
        typer.echo(
            table(found) + f"\n\n{len(job.measure.prompts)} prompts; differences to full, same noise, 95 % intervals"
        )
    typer.echo(f"{folder}/: {', '.join(Path(path).name for path in plans)}")
    typer.echo(f"use one: {sdo('sample', *drawn, '--skip-plan', plans[0])}")
