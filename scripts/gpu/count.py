"""What every arm of gpu/check.py computes, counted on tensors without data: no weights, no GPU."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

from gpu.arms import REFERENCE, Cell, load_arms

from sdo_cli.doctor.workload import workload_of
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.stages import estimate
from sdo_cli.estimate.work import Operation, Work
from sdo_cli.reports.markdown import markdown

# arm to stage to what one iteration asks of the device
Counted = dict[str, dict[str, Work]]


def count_cell(cell: Cell, folder: Path) -> Counted:
    """Means over the plans that the estimator draws: AlignProp, ReFL and DRTune draw how much they compute."""
    found = {}
    for arm, (_, loaded) in load_arms(cell, folder, configs_only=True).items():
        stages = estimate(loaded.recipe, workload_of(loaded, on_cpu=False)).stages
        found[arm] = {stage.name: stage.work for stage in stages if stage.each_step}
    return found


def count_cells(cells: tuple[Cell, ...], folder: Path) -> dict[str, Counted]:
    """By the cell's name."""
    return {cell.name: count_cell(cell, folder) for cell in cells}


def flops_of(stages: dict[str, Work]) -> dict[str, float]:
    """By stage; what has no products (the optimizer) is left out."""
    return {stage: work.flops for stage, work in stages.items() if work.flops}


def as_json(counted: dict[str, Counted]) -> dict[str, Any]:
    """Operations as lists: product, precision, FLOPs, bytes, how often."""
    return {
        cell: {
            arm: {
                stage: [[*astuple(op), number] for op, number in work.operations.items()]
                for stage, work in stages.items()
            }
            for arm, stages in arms.items()
        }
        for cell, arms in counted.items()
    }


def from_json(tree: dict[str, Any]) -> dict[str, Counted]:
    return {
        cell: {
            arm: {
                stage: Work({Operation(*operation): number for *operation, number in rows})
                for stage, rows in stages.items()
            }
            for arm, stages in arms.items()
        }
        for cell, arms in tree.items()
    }


def count_table(counted: Counted, speed: Speed | None = None) -> str:
    """TFLOP per iteration by stage, and the ratio to checkpointed full; ``graph`` is everything on one graph.

    Args:
        speed: of a GPU that seconds are estimated for.
    """
    flops = {arm: flops_of(found) for arm, found in counted.items()}
    stages = list(dict.fromkeys(stage for found in flops.values() for stage in found))
    against = sum(flops[REFERENCE].values())
    rows = []
    for arm, found in flops.items():
        by_stage = [_tera(found[stage]) if stage in found else "" for stage in stages]
        row = [arm, *by_stage, _tera(sum(found.values())), f"{sum(found.values()) / against:.3f}"]
        rows.append(row + ([] if speed is None else _estimated(counted, arm, speed)))
    header = ["TFLOP per iteration", *stages, "all", "/ full"]
    return markdown(header + ([] if speed is None else ["seconds", "/ full"]), rows)


def _estimated(counted: Counted, arm: str, speed: Speed) -> list[str]:
    mine, full = (seconds_of(counted[name], speed) for name in (arm, REFERENCE))
    return [f"{sum(mine.values()):.2f}", f"{sum(mine.values()) / sum(full.values()):.3f}"]


def seconds_of(stages: dict[str, Work], speed: Speed) -> dict[str, float]:
    """The estimator's, by stage."""
    return {stage: work.seconds(speed) for stage, work in stages.items()}


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}" if flops < 1e12 else f"{flops / 1e12:.1f}"
