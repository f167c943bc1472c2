"""`sdo bench`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.bench.variants import QUICK_RULES, STANDARD_RULES, load_variants, plain_full
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.options import Overrides, RulePlugins
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.errors import Interrupted, RecipeFault
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.schema import PromptSource

QUICK = ("num_inference_steps=10", "train_batch_size=2", "gradient_accumulation_steps=1")
PARTS = ("cost", "nearness", "training")
# number of … by default, and with --quick
DEFAULTS = {"rounds": (5, 3), "batches": (4, 2), "draws": (16, 8), "iterations": (60, 10), "seeds": (3, 1)}


@dataclass(frozen=True)
class CountOptions:
    """How much of everything; None is the default, or the smaller one of --quick."""

    rounds: Annotated[int | None, typer.Option(help="Timed rounds after the warm-up; 5.")] = None
    batches: Annotated[int | None, typer.Option(help="Batches on which gradients are compared; 4.")] = None
    draws: Annotated[int | None, typer.Option(help="Plans drawn per rule and batch; 16.")] = None
    iterations: Annotated[int | None, typer.Option(help="Training budget in iterations of sdo; 60.")] = None
    seeds: Annotated[int | None, typer.Option(help="Training runs per rule; 3.")] = None

    def numbers(self, *, quick: bool) -> dict[str, int]:
        return {name: DEFAULTS[name][quick] if value is None else value for name, value in asdict(self).items()}


@grouped
def bench(
    *,
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="The job: a recipe file or shipped name.")] = "bench",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Instead of the recipe's model.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A rule, with options: sdo:steps_per_sample=2, sdo:rollout.skip_plan=FILE. Again for more."),
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; default all. Again for more.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="10 steps, batch 2, six rules, no training: minutes.")] = False,
    counts: CountOptions,
    plugin: RulePlugins = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and plots; default bench/<time>.")] = None,
    output: OutputOptions,
) -> None:
    """Measure gradient rules side by side: cost, nearness to the full gradient, gain for equal computation."""
    load_plugins(plugin or ())
    numbers = counts.numbers(quick=quick)
    parts = tuple(part or (PARTS[:2] if quick else PARTS))
    names = tuple(rule or (QUICK_RULES if quick else STANDARD_RULES))
    check(numbers, parts, names, out)
    words = (*(QUICK if quick else ()), *(overrides or ()), *([f"model={model}"] if model else []))
    # mistakes are told before torch loads
    loaded = load_variants(recipe, words, names)
    if "training" in parts and next(iter(loaded.values())).recipe.validation.prompts == PromptSource():
        raise RecipeFault(["validation.prompts: the training part needs held-out prompts; add them, or --part cost"])
    from sdo_cli.bench.run import BenchSettings, new_bench_folder, run_bench
    from sdo_cli.bench.tables import all_tables

    settings = BenchSettings(recipe, words, names, parts, **numbers)
    try:
        folder = new_bench_folder(out)
    except FileExistsError as fault:
        raise RecipeFault([f"--out {fault}: holds a bench; give another folder"], what="command line") from fault
    reporter = output.reporter()
    try:
        result = run_bench(settings, loaded, folder, reporter)
    except KeyboardInterrupt:
        whole = "holds the parts that were finished" if (folder / "bench.json").exists() else "was not written"
        raise Interrupted(f"interrupted; {folder}/ {whole}", remedy="start it again, into another folder") from None
    finally:
        reporter.close()
    if output.as_json:
        typer.echo(json.dumps({"bench": str(folder / "bench.json")}))
    else:
        typer.echo(f"{all_tables(result)}\n\n{folder}/: bench.json and plots")


def check(numbers: dict[str, int], parts: tuple[str, ...], names: tuple[str, ...], out: Path | None) -> None:
    """Raises RecipeFault with everything that is wrong with the command line."""
    wrong = [f"--{name}: must be at least 1, not {value}" for name, value in numbers.items() if value < 1]
    unknown = [word for word in parts if word not in PARTS]
    wrong += [f"--part {word}: there is no such part; choose from {', '.join(PARTS)}" for word in unknown]
    if "nearness" in parts and plain_full(names) is None:
        wrong.append("--part nearness compares with full: add --rule full, or choose --part cost")
    # a bench that is there says so itself
    if wrong := [*wrong, *unwritable(out or Path("bench"))]:
        raise RecipeFault(wrong, what="command line")
