"""The calls of a rollout that are run again, and what is kept of it for later updates."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.gradients.plan import Plan
from sdo_cli.sampling.loop import Path
from sdo_cli.skipping.walking import Stored


@dataclass
class LiveCall:
    """One (call, sample) that is re-run with a graph: the kept input, its timestep, and what g is multiplied with."""

    x: Tensor
    t: Tensor
    row: int
    factor: float
    followed: bool
    # of the regularisers: one over the sample's number of live calls in an update
    share: float
    call: int = 0
    # what it reads of earlier calls' units, where some were skipped
    kept: Stored | None = None
    # which update it is for, and the network's output in the rollout, where there are several
    turn: int = 0
    e: Tensor | None = None


@dataclass
class Kept:
    """What a rollout leaves for updates after the first.

    Attributes:
        plan: of all updates.
        x_N, g: final latents and the gradient there, ``[B, …]``, at the weights of the rollout.
        losses, rewards: ``[B]`` each.
        live: calls of all updates, with the outputs they had.
        uncertainty: ``[B]``, of the objective then.
    """

    plan: Plan
    x_N: Tensor
    g: Tensor
    losses: Tensor
    rewards: dict[str, Tensor]
    live: list[LiveCall]
    uncertainty: Tensor | None = None


def shares(plan: Plan) -> Tensor:
    """``[calls, B]``: one over the number of live calls that a sample has in the same update."""
    if plan.turn is None:
        return (1 / plan.live.sum(0).clamp(min=1)).expand_as(plan.mode)
    found = torch.zeros_like(plan.weight)
    for update in plan.turn.unique().tolist():
        mine = plan.live & (plan.turn == update)
        found += mine / mine.sum(0).clamp(min=1)
    return found


def pieces_of(path: Path, kept: list[LiveCall], size: int, most: int) -> list[list[LiveCall]]:
    """The live calls in pieces of ``size``; as many as ``most`` of them would make, the rest one call times 0 each."""
    pieces = [kept[start : start + size] for kept in _alike(path, kept) for start in range(0, len(kept), size)]
    for _ in range(len(pieces), -(-most // size)):
        x, t = path.route.levels[0].scale * path.x_0[0].detach(), path.route.begin()[1][0].to(path.x_0.device)
        pieces.append([LiveCall(x, t, 0, 0.0, False, 0.0)])
    return pieces


def _alike(path: Path, kept: list[LiveCall]) -> list[list[LiveCall]]:
    """Live calls that can be run together: those that skip the same units."""
    if path.skips is None or not path.skips.exact:
        return [kept]
    groups: dict[tuple[bool, ...], list[LiveCall]] = {}
    for live in kept:
        groups.setdefault(path.skips.alike(live.call), []).append(live)
    return list(groups.values())


def as_it_was(path: Path, part: list[LiveCall]) -> AbstractContextManager[None]:
    """The network as it was at these live calls, with the units skipped that were."""
    stored = [live.kept for live in part if live.kept]
    return path.skips.again(part[0].call, stored) if path.skips is not None and stored else nullcontext()


@torch.no_grad()
def outputs_of(path: Path, live: list[LiveCall], size: int, most: int) -> int:
    """Write the network's outputs at these calls, as it is now, into them; returns how many calls that took.

    Args:
        size, most: see :func:`pieces_of`.
    """
    made = 0
    for part in pieces_of(path, live, size, most):
        with as_it_was(path, part):
            x, t = torch.stack([call.x for call in part]), torch.stack([call.t for call in part])
            e = path.denoise(x, t, torch.tensor([call.row for call in part], device=x.device))
        for call, output in zip(part, e, strict=True):
            call.e = output.clone()
        made += len(part)
    return made
