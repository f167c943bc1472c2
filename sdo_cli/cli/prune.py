"""`sdo prune`."""

import json
import time
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
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.output import OutputOptions
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
from sdo_cli.errors import Interrupted, RecipeFault
from sdo_cli.installed import sdo

if TYPE_CHECKING:
    from sdo_cli.prune.job import PruneJob


@grouped
def prune(
    *,
    plan: PlanOptions,
    weights: PlainWeights,
    lora: LoraOptions,
    precision: Annotated[str, PRECISION] = "no",
    sampler: FullSampler,
    picture: PlainPicture,
    search: SearchOptions,
    measure: MeasureOptions,
    seed: Annotated[int, typer.Option(help="Of the search and of the noise that is measured on.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default prunes/<method>-<time>.")] = None,
    output: OutputOptions,
) -> None:
    """Find which blocks of which steps can be skipped, and measure what that saves and costs."""
    asked = laid_over(BARE, weights, sampler, picture, precision=precision)
    wrong = problems(plan, search, measure, steps=sampler.steps)
    wrong += drawing_problems(
        asked,
        lora_scales=[lora.lora_scale],
        batch_size=measure.batch_size,
        seed=seed,
        count=measure.num_prompts,
    )
    wrong += file_problems(plan, search)
    specs = reward_specs(measure.reward or [], weights.model, wrong)
    prompts = search_prompts(plan.prompts_file, wrong)
    measured, kept = measured_prompts(prompts, measure.measure_on, measure.num_prompts, wrong)
    folder = out or Path("prunes") / f"{plan.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.is_dir() and any(folder.iterdir()):
        wrong.append(f"--out {folder}: is not empty; give another folder, nothing is overwritten")
    if wrong:
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.drawing.draw import draw_settings
    from sdo_cli.models.load import source_of
    from sdo_cli.prune.job import MeasureSettings, PruneJob

    job = PruneJob(
        source_of(asked),
        asked.mixed_precision,
        draw_settings(asked),
        plan.method,
        plan.ratios,
        plan.grain,
        kept,
        search.settings(),
        MeasureSettings(measured, specs, measure.controls, measure.rounds, measure.batch_size),
        seed,
        lora.stack,
        lora.lora_scale,
        search.scores,
        search.schedule,
    )
    carry_out(job, folder, output)


def carry_out(job: "PruneJob", folder: Path, output: OutputOptions) -> None:
    from sdo_cli.prune.run import prune as run
    from sdo_cli.prune.tables import table

    reporter = output.reporter()
    try:
        found = run(job, folder, reporter)
    except KeyboardInterrupt:
        left = (
            "its scores so far can be used: --scores"
            if (folder / "scores.safetensors").exists()
            else "it holds no plan"
        )
        raise Interrupted(f"interrupted; {folder}/ is kept", remedy=left) from None
    finally:
        reporter.close()
    plans = sorted(str(path) for path in folder.glob("plan-*.json"))
    if output.as_json:
        typer.echo(json.dumps({"folder": str(folder), "plans": plans}))
        return
    if found:
        typer.echo(
            table(found) + f"\n\n{len(job.measure.prompts)} prompts; differences to full, same noise, 95 % intervals"
        )
    typer.echo(f"{folder}/: {', '.join(Path(path).name for path in plans)}")
    typer.echo(f"use one: {sdo('sample', '--skip-plan', plans[0])}")
