"""`sdo eval`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.cli.drawing import (
    BARE,
    BATCH_SIZE,
    ETA,
    TIMESTEPS,
    ModelOptions,
    PictureOptions,
    SolverOptions,
    laid_over,
    with_timesteps,
)
from sdo_cli.cli.evaluate_job import Asked, asked_for, needs_plugins, starting_recipe
from sdo_cli.cli.evaluate_options import MeasureOptions, NoiseOptions, PromptOptions, RewardOptions, VariantOptions
from sdo_cli.cli.from_run import laid_over_run
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.judge_options import JudgeOptions
from sdo_cli.cli.options import RewardPlugins
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.cli.recorded import load_recorded_plugins
from sdo_cli.cli.several import ProcessOptions, in_several_processes, stopped_well
from sdo_cli.errors import RecipeFault
from sdo_cli.plugins import load_plugins


@grouped
def evaluate(
    *,
    prompts: PromptOptions,
    rewards: RewardOptions,
    variants: VariantOptions,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Model, sampling and rewards as in this recipe.")
    ] = None,
    noise: NoiseOptions,
    model: ModelOptions,
    reward_precision: Annotated[str | None, typer.Option(help="What the rewards compute in.")] = None,
    solver: SolverOptions,
    eta: Annotated[float | None, ETA] = None,
    timesteps: Annotated[str | None, TIMESTEPS] = None,
    picture: PictureOptions,
    skip_plan: Annotated[
        list[Path] | None, typer.Option(help="Of `sdo prune`: also draw everything with it. Again for more.")
    ] = None,
    batch_size: Annotated[int, BATCH_SIZE] = 16,
    measures: MeasureOptions,
    judges: JudgeOptions,
    plugin: RewardPlugins = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    processes: ProcessOptions,
    out: Annotated[Path | None, typer.Option(help="Folder; one that holds this evaluation is continued.")] = None,
    output: OutputOptions,
) -> None:
    """Draw a prompt set with and without LoRAs, score the images, and say what differs, with intervals."""
    if wrong := unwritable(out or Path("evals")):
        raise RecipeFault(wrong, what="command line")
    load_plugins(plugin or ())
    start = starting_recipe(recipe, model.model, variants.loras)
    if start is not None and start.run is not None and needs_plugins(rewards, start):
        load_recorded_plugins(start.run, plugin or ())
    more = {"eta": eta, "reward_precision": reward_precision}
    laid, said = laid_over(BARE, model, solver, picture, **more), ""
    if start is not None:
        laid, said = laid_over_run(start.loaded.recipe, None, (model, solver, picture), **more)
    asked = asked_for(
        with_timesteps(laid, timesteps, solver.steps),
        start.loaded if start else None,
        prompts=prompts,
        rewards=rewards,
        variants=variants,
        noise=noise,
        measures=measures,
        judges=judges,
        skip_plans=skip_plan or [],
        steps_given=solver.steps is not None or start is not None,
        batch_size=batch_size,
        fixed_model=bool(recipe or model.model),
    )
    in_several_processes(processes)
    notes = [*start.notes, *([said] if said and start.run else [])] if start else []
    carry_out(asked, measures, out, output, first=notes, batch_size=batch_size, report=report)


def carry_out(
    asked: Asked,
    measures: MeasureOptions,
    out: Path | None,
    output: OutputOptions,
    *,
    first: list[str],
    batch_size: int,
    report: bool,
) -> None:
    """Together with the other processes; the first one shows the result."""
    from sdo_cli.evaluation.run import evaluate as run
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.parallel.world import joined

    job, notes = asked.job()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = out or Path("evals") / f"{job.prompts.name}-{stamp}"
    with stopped_well(lambda: folder), joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        reporter = output.reporter(talks=world.is_main)
        for sentence in [*first, *notes]:
            reporter.note(sentence)
        try:
            with Stopping(None, reporter.note, world) as stopping:
                tree = run(
                    job,
                    folder,
                    reporter,
                    batch_size=batch_size,
                    reference=measures.reference,
                    features=measures.fid_features,
                    inception_weights=measures.inception_weights,
                    distances=measures.kinds,
                    lpips_weights=measures.lpips_weights,
                    report=report,
                    stopping=stopping,
                    world=world,
                    outside=asked.outside,
                )
        finally:
            reporter.close()
        if world.is_main:
            record = {"folder": str(folder), **tree}
            typer.echo(json.dumps(record) if output.as_json else as_text(tree, folder, report=report))


def as_text(tree: dict[str, Any], folder: Path, *, report: bool) -> str:
    """A table per measure: every variant, and its difference to the first."""
    from sdo_cli.evaluation.summary import recommendations, ways

    lines = []
    names = list(dict.fromkeys(name for entry in tree["variants"].values() for name in entry["measures"]))
    width = max(len(name) for name in tree["variants"])
    for name in names:
        lines.append(f"\n{name}")
        for variant, entry in tree["variants"].items():
            if name not in entry["measures"]:
                continue
            row = entry["measures"][name]
            line = f"  {variant:<{width}}  {row['mean']:.4f} ± {_said(row['standard_error'], '.4f')}"
            found = tree["differences"].get(variant, {}).get(name)
            if found:
                d, w = found["difference"], found["win_rate"]
                ends = f"[{_said(d['low'], '+.4f')}, {_said(d['high'], '+.4f')}]"
                won = f"[{100 * w['low']:.0f}, {100 * w['high']:.0f}]"
                line += f"   {d['mean']:+.4f} {ends}   higher on {100 * w['mean']:.0f} % {won}"
            lines.append(line)
    for variant, entry in tree["variants"].items():
        for key, value in entry.get("reference", {}).items():
            if key != "reference_images":
                lines.append(f"\n{key}  {variant}: {value:.4g}")
    lines += [f"\n{sentence}" for sentence in recommendations(tree)]
    if few := tree.get("no_recommendation"):
        lines.append(f"\n{few}")
    base, count = tree["baseline"], tree["prompts"]["count"]
    last = [f"{count} prompt{'s' * (count != 1)}"]
    if pairing := tree["pairing"]:
        last += [f"differences to {base}, {ways(pairing)}", "brackets are 95 % intervals over prompts"]
    lines += ["", *(row["note"] for row in pairing.values() if row["note"]), "; ".join(last)]
    lines.append(f"{folder}/{'report.html' if report else 'summary.json'}")
    return "\n".join(lines).lstrip("\n")


def _said(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
