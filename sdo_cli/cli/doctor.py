"""`sdo doctor`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdo_cli.cli.groups import grouped
from sdo_cli.cli.options import ForMachines, RecipeOptions, RulePlugins
from sdo_cli.errors import EXIT_BAD_INPUT, RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from sdo_cli.doctor.environment import Finding
    from sdo_cli.doctor.examine import Examination
    from sdo_cli.doctor.target import Target
    from sdo_cli.estimate.speed import Speed
    from sdo_cli.estimate.stages import Estimate

GB = 1e9


@grouped
def doctor(
    *,
    recipe: RecipeOptions,
    gpu: Annotated[str | None, typer.Option(help="Fit and time a GPU by its name, like 4090 or a100-80gb.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Fit a GPU of this memory, like 12GB or 24GiB.")] = None,
    plugin: RulePlugins = None,
    as_json: ForMachines = False,
) -> None:
    """Check packages, weights, disk and GPU, and estimate FLOPs, memory and time; runs nothing, needs no weights.

    Without a recipe only the machine: packages, driver, device, disk, cores.
    """
    load_plugins(plugin or ())
    if not recipe.recipe:
        if recipe.overrides or gpu or gpu_memory:
            shown = f"`{sdo('recipe', 'list')}` shows the shipped ones"
            raise RecipeFault([f"--recipe is missing, which overrides and GPUs are for; {shown}"], what="command line")
        machine_alone(as_json)
        return
    loaded = load_recipe(recipe.recipe, recipe.overrides)
    from sdo_cli.doctor.examine import examine
    from sdo_cli.doctor.target import find_target, measured

    target = find_target(gpu_memory, gpu)
    here = gpu is None and gpu_memory is None
    result = examine(loaded, measured(target, loaded.recipe) if here else target)
    typer.echo(json.dumps(as_record(result, loaded.recipe.max_train_steps)) if as_json else as_text(loaded, result))
    if result.problems:
        raise typer.Exit(EXIT_BAD_INPUT)


def machine_alone(as_json: bool) -> None:
    """Raises Exit with 2 when something keeps sdo from running here."""
    from dataclasses import asdict

    from sdo_cli.doctor.environment import look_at_machine

    findings = look_at_machine()
    record = {"findings": [asdict(finding) for finding in findings]}
    typer.echo(json.dumps(record) if as_json else "\n".join(lines_of(findings)))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_BAD_INPUT)


def as_record(result: "Examination", steps: int) -> dict[str, Any]:
    from dataclasses import asdict

    target, estimate, speed = result.target, result.estimate, result.speed
    return {
        "findings": [asdict(finding) for finding in result.findings],
        "device": {"name": target.name, "memory": target.memory, "speed": speed_record(target.speed)},
        "estimate": None if estimate is None else estimate_record(estimate, target, speed, steps),
        "why_no_estimate": result.why_not,
        "fits": result.fits,
        "advice": advice_record(result, steps),
    }


def advice_record(result: "Examination", steps: int) -> dict[str, Any] | None:
    advice, speed = result.advice, result.target.speed
    if advice is None:
        return None
    # with fp16 for bf16, as advised, the speed may be known only now
    known = speed if speed is not None and advice.estimate.is_known(speed) else None
    after = estimate_record(advice.estimate, result.target, known, steps)
    return {"overrides": advice.overrides, "fits": advice.fits, **after}


def estimate_record(estimate: "Estimate", target: "Target", speed: "Speed | None", steps: int) -> dict[str, Any]:
    """Bytes, FLOPs and seconds, which are None where the speed is not known."""
    stages = [
        {
            "stage": stage.name,
            "flops": stage.flops,
            "seconds": None if speed is None else stage.work.seconds(speed),
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
        "seconds_per_step": None if speed is None else estimate.step_seconds(speed),
        "seconds_per_run": None if speed is None else estimate.run_seconds(speed, steps),
        "seconds_per_run_by_flops_alone": None if speed is None else estimate.run_bound(speed, steps),
        "trained_parameters": estimate.trained,
    }


def speed_record(speed: "Speed | None") -> dict[str, Any] | None:
    """FLOP and bytes per second."""
    if speed is None:
        return None
    return {
        "products": speed.products,
        "bandwidth": speed.bandwidth,
        "seconds_per_launch": speed.launch,
        "measured_here": speed.measured,
    }


def as_text(loaded: LoadedRecipe, result: "Examination") -> str:
    lines = lines_of(result.findings)
    if result.estimate is None:
        return "\n".join([*lines, "", f"! no estimate: {result.why_not}"])
    steps = loaded.recipe.max_train_steps
    lines += ["", *table(result.estimate, result.speed), "", *totals(result.estimate, steps)]
    lines += [*pace(result, steps), "", *verdict(loaded, result)]
    return "\n".join(lines)


def lines_of(findings: "Sequence[Finding]") -> list[str]:
    """One for each, and one for what to type; ``!`` before what is wrong."""
    width = max(len(finding.section) for finding in findings)
    lines = []
    for finding in findings:
        mark = "  " if finding.ok else "! "
        lines.append(f"{mark}{finding.section:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"  {'':<{width}}    {finding.remedy}")
    return lines


def table(estimate: "Estimate", speed: "Speed | None") -> list[str]:
    """A line for each stage."""
    lines = [f"{'stage':<12}{'TFLOP':>12}  {'seconds':>9}  {'resident':>9}  {'working':>9}  {'peak':>9}"]
    for stage in estimate.stages:
        sizes = "  ".join(f"{size / GB:6.2f} GB" for size in (stage.resident, stage.working, stage.peak))
        seconds = "?" if speed is None else f"{stage.work.seconds(speed):,.2f}"
        once = "" if stage.each_step else "   per run"
        lines.append(f"{stage.name:<12}{stage.flops / 1e12:12,.2f}  {seconds:>9}  {sizes}{once}")
    return lines


def pace(result: "Examination", steps: int) -> list[str]:
    """How long it takes, and where the figures come from."""
    estimate, speed = result.estimate, result.speed
    assert estimate is not None
    if speed is None:
        why = "name a GPU (--gpu 4090)" if result.target.speed is None else "this GPU lacks the recipe's precision"
        return [f"no estimate of time: {why}"]
    step, run, bound = (
        estimate.step_seconds(speed),
        estimate.run_seconds(speed, steps),
        estimate.run_bound(speed, steps),
    )
    lines = [f"about {duration(step)} a step, {duration(run)} for the run (bound by FLOPs alone: {duration(bound)})"]
    return [*lines, f"{origin(speed)}; error: see docs/benchmarks.md"]


def origin(speed: "Speed") -> str:
    from sdo_cli.estimate.gpus import BANDWIDTH_SHARE, PRODUCT_SHARE

    if not speed.measured:
        shares = f"× {PRODUCT_SHARE} for products, × {BANDWIDTH_SHARE} for bandwidth"
        return f"from the maker's figures {shares}, assumed; published runs of SD 1.5 took 1 to 3 times as long"
    fastest = ", ".join(
        f"{'fp32' if name == 'no' else name} {rate / 1e9:,.1f}" for name, rate in speed.products.items()
    )
    return f"from this machine's speed, measured just now (products in GFLOP/s: {fastest})"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


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
    words = ("finetune", "--recipe", loaded.given, *loaded.overrides, *advice.overrides)
    command = f"    {sdo(*words)}"
    if advice.fits:
        return [*lines, f"  with these changes it needs about {after:.1f} GB:", command]
    lines.append(f"  the least sdo can make of it is about {after:.1f} GB; use a larger GPU or a smaller model")
    return lines + ([f"    {' '.join(advice.overrides)}"] if advice.overrides else [])
