"""`sdo prune`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.cli.drawing import drawing_problems
from sdo_cli.cli.output import make_reporter
from sdo_cli.cli.prune_options import (
    GRADIENTS,
    GRAINS,
    METHODS,
    PRUNERS,
    RATES,
    RATIOS,
    measured_prompts,
    problems,
    reward_specs,
    search_prompts,
)
from sdo_cli.device import PRECISIONS
from sdo_cli.errors import Interrupted, RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.sampling.solvers import AUTO, SOLVERS


def prune(
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", "-p", help="Prompts to search on: a file, or a shipped list.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "dip-go",
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of the network's computation to leave out. Again for more; 0.1 to 0.9."),
    ] = None,
    grain: Annotated[str, typer.Option(help=f"{' or '.join(GRAINS)} (residual and attention layers).")] = "blocks",
    model: Annotated[
        str, typer.Option("--model", "-m", help="embedded, a diffusers folder, a .safetensors checkpoint, a hub id.")
    ] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="fp16: weight files of that name.")] = None,
    lora: Annotated[str | None, typer.Option(help="A run folder or a LoRA file that is drawn with.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Weight of the LoRA.")] = 1.0,
    precision: Annotated[str, typer.Option(help=f"What the model computes in: {', '.join(PRECISIONS)}.")] = "no",
    steps: Annotated[int, typer.Option("--steps", help="num_inference_steps of the full sampler.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="guidance_scale; 1 is without.")] = 7.5,
    solver: Annotated[str, typer.Option(help=f"{AUTO}, or {', '.join(SOLVERS)}.")] = AUTO,
    negative_prompt: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="A plan of chosen steps, whose blocks are pruned too.")] = None,
    updates: Annotated[int, typer.Option(help="Of the gates; dip-go.")] = 500,
    pruner: Annotated[str, typer.Option(help=f"{' or '.join(PRUNERS)}: what the gates come from.")] = "attention",
    gradients: Annotated[str, typer.Option(help=f"{', '.join(GRADIENTS)}: how the gates are trained.")] = "shortcut",
    live_calls: Annotated[int, typer.Option(help="Network calls with gradients; shortcut and one-step.")] = 4,
    distance: Annotated[str, typer.Option(help="ssim, l1 or l2, to the full sampler's image.")] = "ssim",
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Of the gates; by the pruner.")] = None,
    sparsity: Annotated[float, typer.Option(help="Weight of the computation in the loss.")] = 1.0,
    scores: Annotated[
        Path | None, typer.Option(help="Folder of an earlier search: other ratios of it, without searching.")
    ] = None,
    measure_on: Annotated[
        str | None, typer.Option(help="Prompts to measure on; by default some of --prompts are kept for it.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts to measure on, at most; 0 measures nothing.")] = 32,
    reward: Annotated[list[str] | None, typer.Option(help="Also measured. Again for more.")] = None,
    controls: Annotated[bool, typer.Option(help="Also samplers with as much computation, at three ratios.")] = True,
    rounds: Annotated[int, typer.Option(help="Of timing.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images at a time when measuring.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the search and of the noise that is measured on.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default prunes/<method>-<time>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find which blocks of which steps can be skipped, and measure what that saves and costs."""
    ratios = sorted(dict.fromkeys(ratio or RATIOS))
    wrong = problems(
        method=method,
        ratios=ratios,
        grain=grain,
        pruner=pruner,
        gradients=gradients,
        distance=distance,
        numbers={"updates": updates, "live-calls": live_calls, "rounds": rounds},
        num_prompts=num_prompts,
        learning_rate=learning_rate,
        sparsity=sparsity,
        steps=steps,
    )
    wrong += drawing_problems(
        steps=steps,
        guidance=guidance,
        lora_scales=[lora_scale],
        eta=0.0,
        batch_size=batch_size,
        seed=seed,
        count=num_prompts,
        solver=solver,
        precision=precision,
        prediction_type=None,
        height=height,
        width=width,
    )
    wrong += [
        f"--{n} {path}: there is no such file"
        for n, path in (("scores", scores), ("schedule", schedule))
        if path and not path.exists()
    ]
    if scores is not None and method != "dip-go":
        wrong.append(f"--scores: are of a search; --method {method} makes none")
    specs = reward_specs(reward or [], model, wrong)
    prompts = search_prompts(prompts_file, wrong)
    measured, kept = measured_prompts(prompts, measure_on, num_prompts, wrong)
    folder = out or Path("prunes") / f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.is_dir() and any(folder.iterdir()):
        wrong.append(f"--out {folder}: is not empty; give another folder, nothing is overwritten")
    if wrong:
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.drawing.draw import DrawSettings
    from sdo_cli.models.load import ModelSource
    from sdo_cli.prune.job import MeasureSettings, PruneJob
    from sdo_cli.prune.run import prune as run
    from sdo_cli.prune.search import SearchSettings
    from sdo_cli.prune.tables import table

    rate, optimizer = RATES[pruner]
    job = PruneJob(
        ModelSource(model, revision, variant, None, True, None),
        precision,
        DrawSettings(solver, 0.0, steps, guidance, negative_prompt, height, width),
        method,
        ratios,
        grain,
        kept,
        SearchSettings(
            pruner, gradients, distance, updates, 1, rate if learning_rate is None else learning_rate, optimizer,
            sparsity, live_calls=live_calls,
        ),
        MeasureSettings(measured, specs, controls, rounds, batch_size),
        seed,
        lora,
        lora_scale,
        scores,
        schedule,
    )  # fmt: skip
    reporter = make_reporter(as_json=as_json, quiet=quiet)
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
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "plans": plans}))
        return
    if found:
        typer.echo(table(found) + f"\n\n{len(measured)} prompts; differences to full, same noise, 95 % intervals")
    typer.echo(f"{folder}/: {', '.join(Path(path).name for path in plans)}")
    typer.echo(f"use one: {sdo('sample', '--skip-plan', plans[0])}")
