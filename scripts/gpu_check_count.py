"""FLOPs of every arm of gpu_check.py, counted on tensors without data: no weights, no GPU."""

from pathlib import Path

from gpu_check_arms import REFERENCE, Cell, load_arms

from sdo_cli.doctor.workload import workload_of
from sdo_cli.estimate.stages import estimate
from sdo_cli.reports.markdown import markdown

# arm to stage to FLOPs of one iteration
Counted = dict[str, dict[str, float]]


def count_cell(cell: Cell, folder: Path) -> Counted:
    """Means over the plans that the estimator draws: AlignProp, ReFL and DRTune draw how much they compute."""
    found = {}
    for arm, (_, loaded) in load_arms(cell, folder, configs_only=True).items():
        stages = estimate(loaded.recipe, workload_of(loaded, on_cpu=False)).stages
        found[arm] = {stage.name: stage.flops for stage in stages if stage.each_step and stage.flops}
    return found


def count_cells(cells: tuple[Cell, ...], folder: Path) -> dict[str, Counted]:
    """By the cell's name. Cells that differ in their batch alone are counted once: all of it grows with the batch."""
    once: dict[str, tuple[int, Counted]] = {}
    for cell in cells:
        if cell.kind not in once:
            once[cell.kind] = cell.batch, count_cell(cell, folder)
    return {cell.name: _scaled(once[cell.kind][1], cell.batch / once[cell.kind][0]) for cell in cells}


def _scaled(counted: Counted, factor: float) -> Counted:
    return {arm: {stage: factor * flops for stage, flops in stages.items()} for arm, stages in counted.items()}


def count_table(counted: Counted) -> str:
    """TFLOP per iteration by stage, and the ratio to checkpointed full; ``graph`` is everything on one graph."""
    stages = list(dict.fromkeys(stage for found in counted.values() for stage in found))
    against = sum(counted[REFERENCE].values())
    rows = []
    for arm, found in counted.items():
        by_stage = [_tera(found[stage]) if stage in found else "" for stage in stages]
        rows.append([arm, *by_stage, _tera(sum(found.values())), f"{sum(found.values()) / against:.3f}"])
    return markdown(["TFLOP per iteration", *stages, "all", "/ full"], rows)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}" if flops < 1e12 else f"{flops / 1e12:.1f}"
