"""The three-stage engine: rollout without a graph, score, shortcut (docs/architecture.md).

    1. Rollout   x_N and, for the live calls, the network's (scaled) inputs; no graph.
    2. Score     g = ∂J/∂x_N through decoder and reward only.
    3. Shortcut  re-run the network with a graph on the kept inputs and send back <sg(w_i g / p_i), e_i>.

The result equals one graph with the same live calls. Peak memory is the larger of (decoder + reward) and one
network call, and does not grow with the number of steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.gradients.outcome import Objective, Outcome, Stopwatch, micro_batches, score_and_differentiate
from sdo_cli.gradients.plan import Plan
from sdo_cli.sampling.loop import Path, denoise_path


@dataclass(frozen=True)
class MicroBatches:
    """Samples per piece in each stage; None takes the whole batch (never more, also when K > 1 calls are live)."""

    rollout: int | None = None
    score: int | None = None
    shortcut: int | None = None


@dataclass(frozen=True)
class LiveCall:
    """One (call, sample) that is re-run with a graph: the kept input, its timestep, and what g is multiplied with."""

    x: Tensor
    t: Tensor
    row: int
    factor: float


@torch.no_grad()
def rollout(path: Path, plan: Plan, *, micro: int | None = None) -> tuple[Tensor, list[LiveCall]]:
    """Stage 1: final latents ``[B, …]`` and the live calls with their inputs."""
    w, kept, finals = path.coefficients.w, [], []
    live = plan.live
    for rows in micro_batches(path.rows, micro):
        part = Path(path.scheduler, path.num_inference_steps, path.denoise, path.x_0[rows])
        mine = rows.cpu()

        def call(i: int, x: Tensor, t: Tensor, rows: Tensor = rows, mine: Tensor = mine) -> Tensor:
            for j in live[i, mine].nonzero().flatten().tolist():
                row = int(mine[j])
                kept.append(LiveCall(x[j].clone(), t[j].clone(), row, w[i] * plan.weight[i, row].item()))
            return path.denoise(x, t, rows)

        finals.append(denoise_path(part, call))
    return torch.cat(finals), kept


def shortcut(path: Path, kept: list[LiveCall], g: Tensor, *, micro: int | None = None) -> None:
    """Stage 3: accumulate ``Σ factor · (∂e/∂θ)ᵀ g`` into the parameters' gradients."""
    size = micro or len(g)
    for start in range(0, len(kept), size):
        part = kept[start : start + size]
        rows = torch.tensor([live.row for live in part], device=g.device)
        factor = torch.tensor([live.factor for live in part], device=g.device, dtype=torch.float64)
        e = path.denoise(torch.stack([live.x for live in part]), torch.stack([live.t for live in part]), rows)
        # the product in at least fp32: g is small and e may be half precision
        exact = torch.float64 if e.dtype == torch.float64 else torch.float32
        direction = factor.to(exact).view(-1, *[1] * (g.dim() - 1)) * g[rows].to(exact)
        (direction * e.to(exact)).sum().backward()


def three_stage(
    path: Path,
    plan: Plan,
    objective: Objective,
    *,
    divisor: float | None = None,
    micro: MicroBatches | None = None,
    change_g: Callable[[Tensor], Tensor] | None = None,
) -> Outcome:
    """Carry out a plan in which no live call depends on an earlier live one.

    Args:
        divisor: the total loss is ``Σ losses / divisor``; the batch size by default.
        change_g: for control experiments only: replaces g before stage 3.

    Raises:
        ValueError: the plan chains live calls; it needs one graph.
    """
    if not plan.is_one_step_deep():
        raise ValueError("this plan chains live calls: use the one-graph engine")
    micro, watch = micro or MicroBatches(), Stopwatch(path.x_0.device)
    with watch.stage("rollout"):
        x_N, kept = rollout(path, plan, micro=micro.rollout)
    with watch.stage("score"):
        losses, g, rewards = score_and_differentiate(objective, x_N, divisor=divisor or plan.batch, micro=micro.score)
        if change_g is not None:
            g = change_g(g)
    with watch.stage("shortcut"):
        shortcut(path, kept, g, micro=micro.shortcut)
    calls = {"no_grad": plan.calls * plan.batch, "grad": len(kept)}
    return Outcome(x_N, losses, rewards, g, watch.seconds, calls)
