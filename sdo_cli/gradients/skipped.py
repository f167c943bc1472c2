"""Gradients of rollouts that skip (docs/pruning.md).

A call that repeats an output has no output of its own: x_N = A x_0 + Σ_k W_k e_k runs over the computed calls alone,
W_k the sum of the solver's weights over the calls that hand out e_k. The exact estimator draws live calls among those
and runs them again with the same units skipped; stored outputs of single units are data there, as inputs are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.gradients.plan import Plan
from sdo_cli.sampling.coefficients import Coefficients
from sdo_cli.skipping.walking import Skips


def plan_among_computed(
    rule: Callable[[int, Coefficients], Plan], coefficients: Coefficients, sources: Sequence[int]
) -> Plan:
    """What ``rule(calls, coefficients)`` draws when it is shown the computed calls alone, over all calls."""
    computed = sorted(set(sources))
    merged = coefficients.merged(sources)
    plan = rule(len(computed), Coefficients(merged.A, tuple(merged.w[i] for i in computed)))
    if plan.endpoint is not None or plan.repeats is not None or plan.as_epsilon:
        raise ValueError("exact gradients of a pruned rollout need a rule that ends at x_N, in the native output")

    def over_all(values: Tensor) -> Tensor:
        found = torch.zeros(len(sources), plan.batch, dtype=values.dtype)
        found[computed] = values
        return found

    turn = None if plan.turn is None else over_all(plan.turn)
    return replace(plan, mode=over_all(plan.mode), weight=over_all(plan.weight), turn=turn)


def check_skips(skips: Skips | None, plan: Plan, *, steered: bool) -> list[int] | None:
    """Where each call's output comes from when gradients are those of the pruned sampler, else None.

    Raises:
        ValueError: the plan's live calls have no output of their own, or something outside the network is optimised.
    """
    if skips is None:
        return None
    if plan.calls != skips.plan.calls:
        raise ValueError(f"the skip plan has {skips.plan.calls} calls, the solver {plan.calls}")
    if steered:
        raise ValueError("a pruned rollout serves weights, not latents, noise or guidance")
    if not skips.exact:
        return None
    if skips.plan.loses_gradients:
        raise ValueError("this network makes outputs of stored ones alone: exact gradients would miss them, take whole")
    repeated = torch.tensor([source != i for i, source in enumerate(skips.plan.sources)])
    if bool(plan.live[repeated].any()):
        raise ValueError("a live call repeats the output of another: draw among the computed ones")
    return list(skips.plan.sources)


def calls_made(skips: Skips | None, plan: Plan) -> int:
    """Network calls of the rollout per sample, the partly computed ones included."""
    if skips is None:
        return plan.calls_run
    return sum(not repeated for repeated in skips.plan.repeats[: plan.calls_run])
