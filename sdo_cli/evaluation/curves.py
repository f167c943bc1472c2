"""A curve over a run's checkpoints belongs to the run too: its report draws what was evaluated last."""

from contextlib import suppress
from pathlib import Path

from sdo_cli.evaluation.summary import Measured, checkpoint_curves, step_of, values_of
from sdo_cli.files import write_json
from sdo_cli.models.lora_paths import lora_place
from sdo_cli.runs.read import EVALUATED, run_of
from sdo_cli.scoring.statistics import mean_interval


def leave_curves(measured: list[Measured], folder: Path) -> None:
    """Into the folder of every run of which several checkpoints were drawn: means by step with 95 % intervals.

    Args:
        folder: of the evaluation, which is named there.
    """
    for curve in checkpoint_curves(measured).values():
        run = run_of(lora_place(curve[-1].variant.lora or ""))
        if run is None:
            continue
        means = {}
        for measure in curve[-1].scores:
            found = [(step_of(m.variant), values_of(m.scores[measure])) for m in curve if m.scores.get(measure)]
            points = [(step, mean_interval(values)) for step, values in found if len(values) > 1]
            if len(points) > 1:
                means[measure] = [[step, one.mean, one.low, one.high] for step, one in points]
        # somebody else's run may be read-only; the evaluation has it all
        with suppress(OSError):
            write_json(run / EVALUATED, {"evaluation": str(folder.absolute()), "measures": means})
