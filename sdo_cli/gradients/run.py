"""Chooses the engine for a plan and puts the repeats together."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.outcome import Objective, Outcome, Terms, added
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.repeats import repeated
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.sampling.loop import Path

# engine(path, plan, objective, terms) -> Outcome
Engine = Callable[[Path, Plan, Objective, Terms], Outcome]


def run_plan(
    path: Path,
    plan: Plan,
    objective: Objective,
    *,
    terms: Terms | None = None,
    micro: MicroBatches | None = None,
    checkpointing: bool = True,
    change_g: Callable[[Tensor], Tensor] | None = None,
    keep: bool = False,
) -> Outcome:
    """Three stages where the plan allows it (less memory, own micro-batches), else one graph.

    Args:
        checkpointing: on one graph, recompute each live call in the backward pass.
        keep: leave the live calls in the outcome, so that they can be made again.

    Raises:
        ValueError: ``change_g`` or ``keep`` with a plan that needs one graph, where g never stands alone; ``keep`` with
            repeats, which have live calls of their own.
    """
    if keep and plan.repeats is not None:
        raise ValueError("live calls that are to be made again are those of one pass, and this plan repeats it")

    def engine(path: Path, plan: Plan, objective: Objective, terms: Terms) -> Outcome:
        if plan.is_one_step_deep(latents=path.is_steered):
            return three_stage(path, plan, objective, terms=terms, micro=micro, change_g=change_g, keep=keep)
        if change_g is not None or keep:
            raise ValueError(f"{'keep' if keep else 'change_g'} needs a plan the three-stage engine serves")
        return one_graph(path, plan, objective, terms=terms, checkpointing=checkpointing)

    return with_repeats(engine, path, plan, objective, terms or Terms())


def with_repeats(engine: Engine, path: Path, plan: Plan, objective: Objective, terms: Terms) -> Outcome:
    """The plan and its repeats, averaged. ``x_N``, g and rewards are the first pass's; losses are means."""
    count = 1 if plan.repeats is None else 1 + len(plan.repeats)
    shared = replace(terms, divisor=count * (terms.divisor or plan.batch))
    kept = replace(shared, last_backward=None)
    first = engine(path, plan, objective, shared if count == 1 else kept)
    others = enumerate(repeated(path, plan, first.x_N), start=2)
    again = [engine(p, q, objective, shared if number == count else kept) for number, (p, q) in others]
    if not again:
        return first
    parts = [first, *again]
    return replace(
        first,
        losses=torch.stack([part.losses for part in parts]).mean(0),
        seconds=added([part.seconds for part in parts]),
        calls={kind: sum(part.calls[kind] for part in parts) for kind in first.calls},
        penalties=None
        if first.penalties is None
        else torch.stack([part.penalties for part in parts if part.penalties is not None]).mean(0),
    )
