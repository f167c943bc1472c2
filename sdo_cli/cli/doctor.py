"""`sdo doctor`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdo_cli.errors import EXIT_BAD_INPUT, RecipeFault
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from sdo_cli.doctor.examine import Examination
    from sdo_cli.doctor.target import Target
    from sdo_cli.estimate.stages import Estimate

GB = 1e9


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.")] = "",
    gpu_memory: Annotated[str | None, typer.Option(help="Fit a GPU of this memory, like 12GB or 24GiB.")] = None,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with gradient rules of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Check packages, weights, disk and GPU, and estimate FLOPs and memory; runs nothing, needs no weights."""
    if not recipe:
        raise RecipeFault(["--recipe is missing; `sdo recipe list` shows the shipped ones"], what="command line")
    load_plugins(plugin or ())
    loaded = load_recipe(recipe, overrides)
    from sdo_cli.doctor.examine import examine
    from sdo_cli.doctor.target import find_target

    result = examine(loaded, find_target(gpu_memory))
    typer.echo(json.dumps(as_record(result)) if as_json else as_text(loaded, result))
    if result.problems:
        raise typer.Exit(EXIT_BAD_INPUT)


def as_record(result: "Examination") -> dict[str, Any]:
    from dataclasses import asdict

    target, estimate, advice = result.target, result.estimate, result.advice
    return {
        "findings": [asdict(finding) for finding in result.findings],
        "device": {"name": target.name, "memory": target.memory},
        "estimate": None if estimate is None else estimate_record(estimate, target),
        "why_no_estimate": result.why_not,
        "fits": result.fits,
        "advice": None
        if advice is None
        else {"overrides": advice.overrides, "fits": advice.fits, **estimate_record(advice.estimate, target)},
    }


def estimate_record(estimate: "Estimate", target: "Target") -> dict[str, Any]:
    """Bytes and FLOPs."""
    stages = [
        {
            "stage": stage.name,
            "flops": stage.flops,
            "each_step": stage.each_step,
            "resident": stage.resident,
            "working": stage.working,
        }
        for stage in estimate.stages
    ]
    return {
        "stages": stages,
        "peak_of_tensors": estimate.peak,
        "needed": target.needed(estimate.peak),
        "flops_per_step": estimate.flops,
        "trained_parameters": estimate.trained,
    }


def as_text(loaded: LoadedRecipe, result: "Examination") -> str:
    width = max(len(finding.section) for finding in result.findings)
    lines = []
    for finding in result.findings:
        mark = "  " if finding.ok else "! "
        lines.append(f"{mark}{finding.section:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"  {'':<{width}}    {finding.remedy}")
    if result.estimate is None:
        return "\n".join([*lines, "", f"! no estimate: {result.why_not}"])
    steps = loaded.recipe.max_train_steps
    lines += ["", *table(result.estimate), "", *totals(result.estimate, steps), "", *verdict(loaded, result)]
    return "\n".join(lines)


def table(estimate: "Estimate") -> list[str]:
    """A line for each stage."""
    lines = [f"{'stage':<12}{'TFLOP':>12}  {'resident':>9}  {'working':>9}  {'peak':>9}"]
    for stage in estimate.stages:
        sizes = "  ".join(f"{size / GB:6.2f} GB" for size in (stage.resident, stage.working, stage.peak))
        lines.append(f"{stage.name:<12}{stage.flops / 1e12:12,.2f}  {sizes}{'' if stage.each_step else '   per run'}")
    return lines


def totals(estimate: "Estimate", steps: int) -> list[str]:
    once = sum(stage.flops for stage in estimate.stages if not stage.each_step)
    run = (steps * estimate.flops + once) / 1e15
    lines = [
        f"{estimate.flops / 1e12:,.1f} TFLOP a step, {run:,.2f} PFLOP for the run of {steps} steps; "
        f"{estimate.trained:,} trained parameters",
        "counted on tensors without numbers; a multiply-add is two FLOPs, and attention is a fused kernel",
    ]
    return lines + [f"note: {note}" for note in estimate.notes]


def verdict(loaded: LoadedRecipe, result: "Examination") -> list[str]:
    estimate, target, advice = result.estimate, result.target, result.advice
    assert estimate is not None
    need, has = target.needed(estimate.peak) / GB, target.memory / GB
    allowed = f"tensors {estimate.peak / GB:.1f} GB in stage {estimate.largest.name}, + {target.slack:.0%} and "
    allowed += (
        f"{target.context / GB:.1f} GB for {'Python and its libraries' if target.on_cpu else 'CUDA (not measured)'}"
    )
    if advice is None:
        return [f"fits {target.name} ({has:.1f} GB): needs about {need:.1f} GB ({allowed})"]
    lines = [f"! does not fit {target.name} ({has:.1f} GB): needs about {need:.1f} GB ({allowed})"]
    after = target.needed(advice.estimate.peak) / GB
    words = ("sdo", "finetune", "--recipe", loaded.given, *loaded.overrides, *advice.overrides)
    command = f"    {shlex.join(words)}"
    if advice.fits:
        return [*lines, f"  with these changes it needs about {after:.1f} GB:", command]
    lines.append(f"  the least sdo can make of it is about {after:.1f} GB; use a larger GPU or a smaller model")
    return lines + ([f"    {' '.join(advice.overrides)}"] if advice.overrides else [])
