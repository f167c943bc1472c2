"""The one-graph engine: the whole trajectory under autograd, live calls checkpointed. Serves every plan."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdo_cli.gradients.outcome import Objective, Outcome, Stopwatch
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.sampling.loop import Path, denoise_path


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` broadcast over the other dimensions of ``like``."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))


def one_graph(
    path: Path, plan: Plan, objective: Objective, *, divisor: float | None = None, checkpointing: bool = True
) -> Outcome:
    """Carry out any plan. With ``checkpointing`` each live call is recomputed in the backward pass."""
    rows, watch, live_calls = path.rows, Stopwatch(path.x_0.device), 0

    def call(i: int, x: Tensor, t: Tensor) -> Tensor:
        nonlocal live_calls
        mode = plan.mode[i]
        if not bool(plan.live[i].any()):
            with torch.no_grad():
                return path.denoise(x.detach(), t, rows)
        live_calls += plan.batch
        through = _per_sample(mode == Mode.THROUGH, x)
        seen = x if bool(through.all()) else torch.where(through, x, x.detach())
        if checkpointing:
            e = checkpoint(path.denoise, seen, t, rows, use_reentrant=False)
        else:
            e = path.denoise(seen, t, rows)
        constant = e.detach()
        # same value, gradient times the plan's weight (0 where frozen)
        weight = _per_sample(plan.weight[i] * plan.live[i], e).to(e.dtype)
        return e if bool((weight == 1).all()) else constant + weight * (e - constant)

    with watch.stage("forward"):
        x_N = denoise_path(path, call)
        x_N.retain_grad()
        scored = objective(x_N, rows)
    with watch.stage("backward"):
        (scored.losses.sum() / (divisor or plan.batch)).backward()
    g = x_N.grad if x_N.grad is not None else torch.zeros_like(x_N)
    total = plan.calls * plan.batch
    calls = {"no_grad": total - live_calls, "grad": live_calls}
    return Outcome(x_N.detach(), scored.losses.detach(), scored.rewards, g, watch.seconds, calls)
