"""Chooses the engine for a plan."""

from collections.abc import Callable

from torch import Tensor

from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.outcome import Objective, Outcome
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.sampling.loop import Path


def run_plan(
    path: Path,
    plan: Plan,
    objective: Objective,
    *,
    divisor: float | None = None,
    micro: MicroBatches | None = None,
    change_g: Callable[[Tensor], Tensor] | None = None,
) -> Outcome:
    """Three stages where the plan allows it (less memory, own micro-batches), else one graph.

    Raises:
        ValueError: ``change_g`` with a plan that needs one graph, where g never stands alone.
    """
    if plan.is_one_step_deep():
        return three_stage(path, plan, objective, divisor=divisor, micro=micro, change_g=change_g)
    if change_g is not None:
        raise ValueError("change_g needs a plan the three-stage engine serves")
    return one_graph(path, plan, objective, divisor=divisor)
