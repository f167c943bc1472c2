"""A whole bench: cost, nearness, training, in that order, and what is written after each."""

import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdo_cli.bench import plots
from sdo_cli.bench.bench_job import Workbench, new_adapter, open_workbench
from sdo_cli.bench.cost import measure_cost
from sdo_cli.bench.memory import measure_memory
from sdo_cli.bench.nearness import measure_nearness
from sdo_cli.bench.record import cost_record, nearness_record, training_record, training_scores
from sdo_cli.bench.result import BenchResult
from sdo_cli.bench.training import compare_training
from sdo_cli.bench.variants import Variant, plain_full
from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import write_json
from sdo_cli.progress import Reporter
from sdo_cli.provenance import now, versions
from sdo_cli.recipe.load import LoadedRecipe

# gradients are compared at an adapter that has moved: a fresh one has no gradient in half of its weights
MOVED = 0.02


@dataclass(frozen=True)
class BenchSettings:
    """Attributes:
    parts: some of cost, nearness, training; training needs the FLOPs that cost counts, so cost is always counted.
    rounds: timed rounds after the warm-up.
    batches, draws: of the nearness part.
    iterations: training budget, in steps of ``sdo``.
    seeds: training runs per rule.
    """

    recipe: str
    overrides: tuple[str, ...]
    variants: tuple[str, ...]
    parts: tuple[str, ...]
    rounds: int
    batches: int
    draws: int
    iterations: int
    seeds: int


def run_bench(
    settings: BenchSettings, loaded: dict[Variant, LoadedRecipe], folder: Path, reporter: Reporter
) -> BenchResult:
    """Measure; write ``bench.json`` and a plot of each part into ``folder``, anew after every part and training run."""
    started = now()
    bench = open_workbench(loaded)
    new_adapter(bench, seed=0, moved=MOVED)
    timed = "cost" in settings.parts
    result = BenchResult(measure_cost(bench, rounds=settings.rounds if timed else 0, reporter=reporter), {}, {}, None)
    # without those that did not fit
    loaded = {variant: item for variant, item in loaded.items() if variant in bench.jobs}
    if timed:
        _write(settings, bench, result, folder, started)
        plots.draw("cost", result, folder)
        result.memory = measure_memory(bench, loaded, settings.recipe, list(settings.overrides), reporter)
        _write(settings, bench, result, folder, started)
    if "nearness" in settings.parts:
        name = plain_full(variant.name for variant in loaded)
        full = next((variant for variant in loaded if variant.name == name), None)
        if full is None:
            raise EnvironmentFault("full did not fit: there is nothing to compare with", remedy="choose --part cost")
        result.nearness = measure_nearness(
            bench, full, batches=settings.batches, draws=settings.draws, reporter=reporter
        )
        _write(settings, bench, result, folder, started)
        plots.draw("nearness", result, folder)
    if "training" in settings.parts:
        seeds, variants = settings.seeds, distinct(loaded)
        for so_far in compare_training(
            bench, result.cost, variants, iterations=settings.iterations, seeds=seeds, reporter=reporter
        ):
            result.training = so_far
            _write(settings, bench, result, folder, started)
            plots.draw("training", result, folder)
    return result


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """One of each gradient: variants that only recompute otherwise train the same; the first of them counts."""
    return list({variant.plan_name: variant for variant in reversed(list(variants))}.values())[::-1]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def _write(settings: BenchSettings, bench: Workbench, result: BenchResult, folder: Path, started: str) -> None:
    recipe = bench.any_job.recipe
    record: dict[str, Any] = {
        "started": started,
        "written": now(),
        "machine": machine(),
        "versions": versions(),
        "settings": {**asdict(settings), "moved_adapter": MOVED},
        "model": recipe.model,
        "solver": recipe.solver,
        "num_inference_steps": recipe.num_inference_steps,
        "guidance_scale": recipe.guidance_scale,
        "batch": bench.any_job.global_batch,
        "cost": cost_record(result.cost, result.memory),
    }
    if result.nearness:
        record["nearness"] = nearness_record(result.nearness)
    if result.training:
        record["training"] = training_record(result.training)
        write_json(folder / "training_scores.json", training_scores(result.training))
    write_json(folder / "bench.json", record)


def new_bench_folder(out: Path | None) -> Path:
    """``bench/<time>`` or ``out``; raises FileExistsError when it holds a bench already."""
    folder = out or Path("bench") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / "bench.json").exists():
        raise FileExistsError(str(folder))
    return folder
