"""The three-stage engine: rollout without a graph, score, shortcut (docs/architecture.md).

    1. Rollout   x_N and, for the live calls, the network's (scaled) inputs; no graph.
    2. Score     g = ∂J/∂x_N through decoder and reward only.
    3. Shortcut  re-run the network with a graph on the kept inputs and send back <sg(w_i g / p_i), e_i>.

The result equals one graph with the same live calls. Peak memory is the larger of (decoder + reward) and one
network call, and does not grow with the number of steps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdo_cli.gradients.linear import LinearPath, linear_path
from sdo_cli.gradients.outcome import Objective, Outcome, Stopwatch, Terms, micro_batches, score_and_differentiate
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.skipped import calls_made, check_skips
from sdo_cli.sampling.loop import Denoise, Path, RunCall, denoise_path
from sdo_cli.skipping.walking import Stored, Walk


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
    followed: bool
    # of the regulariser: one over the sample's number of live calls
    share: float
    call: int = 0
    # what it reads of earlier calls' units, where some were skipped
    kept: Stored | None = None


@dataclass(frozen=True)
class Towards:
    """What guidance adds to some samples at one call, ``e_cond - e_uncond``, and the solver's weight of that call."""

    t: Tensor
    rows: Tensor
    direction: Tensor
    w: Tensor


@dataclass(frozen=True)
class Rollout:
    """Stage 1: the reward's latents ``[B, …]``, the live calls with their inputs, and, where guidance scales want a
    gradient, what they multiply."""

    x_N: Tensor
    live: list[LiveCall]
    towards: list[Towards]


@torch.no_grad()
def rollout(path: Path, plan: Plan, linear: LinearPath, *, micro: int | None = None) -> Rollout:
    """Stage 1."""
    kept, towards, finals = [], [], []
    wants_scales = path.steered is not None and path.steered.scale.requires_grad
    live, followed, share = plan.live, plan.mode == Mode.THROUGH, 1 / plan.live.sum(0).clamp(min=1)
    exact = path.skips is not None and path.skips.exact
    for mine in micro_batches(torch.arange(plan.batch), micro):
        rows, run = mine.to(path.x_0.device, non_blocking=True), path.begin()

        def call(i: int, x: Tensor, t: Tensor, rows: Tensor = rows, mine: Tensor = mine, run: RunCall = run) -> Tensor:
            parts = run(i, lambda: path.drawn(x, t, rows))
            for j in live[i, mine].nonzero().flatten().tolist():
                row = int(mine[j])
                factor, follow = linear.factor[i, row].item(), bool(followed[i, row])
                stored = run.kept(i, j, len(mine)) if exact and isinstance(run, Walk) else None
                kept.append(LiveCall(x[j].clone(), t[j].clone(), row, factor, follow, share[row].item(), i, stored))
            if wants_scales and len(parts) == 2:
                towards.append(Towards(t, rows, parts[1], linear.w[i, mine]))
            return path.join(parts, t, rows)

        endpoint = None if plan.endpoint is None else plan.endpoint[mine]
        finals.append(denoise_path(path, call, rows=rows, endpoint=endpoint, last=plan.last))
    return Rollout(torch.cat(finals), kept, towards)


@torch.no_grad()
def straight(path: Path, linear: LinearPath, g: Tensor, towards: list[Towards]) -> None:
    """What reaches the latent, injected noise and guidance scales beside the network: the linear path alone."""

    def times_g(factor: Tensor) -> Tensor:
        return factor.to(g.dtype).to(g.device).view(-1, *[1] * (g.dim() - 1)) * g

    if path.x_0.requires_grad:
        _accumulate(path.x_0, times_g(linear.identity))
    if path.injected is not None and path.injected.requires_grad:
        _accumulate(path.injected, torch.stack([times_g(factor) for factor in linear.noise]))
    for part in towards:
        assert path.steered is not None
        along = (g[part.rows] * part.direction).flatten(1).sum(1)
        path.steered.add_to_scales(part.w.to(along) * along, part.t, part.rows)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _pieces(path: Path, kept: list[LiveCall], size: int, most: int) -> list[list[LiveCall]]:
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


def _as_it_was(path: Path, part: list[LiveCall]) -> AbstractContextManager[None]:
    """The network as it was at these live calls, with the units skipped that were."""
    stored = [live.kept for live in part if live.kept]
    return path.skips.again(part[0].call, stored) if path.skips is not None and stored else nullcontext()


def shortcut(path: Path, pieces: list[list[LiveCall]], g: Tensor, terms: Terms) -> Tensor | None:
    """Stage 3: accumulate ``Σ factor · (∂e/∂θ)ᵀ g`` into the parameters' gradients, and into ``x_0.grad``.

    Returns:
        The regulariser's penalty per sample ``[B]``, None when it is off.
    """
    # scales have their whole gradient by then
    denoise = path.steered.held() if path.steered else path.denoise
    penalties = torch.zeros(len(g), device=g.device) if terms.kl_weight else None
    for number, part in enumerate(pieces):
        backward = terms.closing if number == len(pieces) - 1 else terms.backward
        # with its backward pass: blocks that are recomputed skip the same units
        with _as_it_was(path, part):
            _send_back(path, denoise, part, g, terms=replace(terms, backward=backward), penalties=penalties)
    return penalties


def _send_back(
    path: Path, denoise: Denoise, part: list[LiveCall], g: Tensor, *, terms: Terms, penalties: Tensor | None
) -> None:
    """One piece of live calls."""
    wants_x0 = path.x_0.requires_grad
    rows = torch.tensor([live.row for live in part], device=g.device)
    x, t = torch.stack([live.x for live in part]).requires_grad_(wants_x0), torch.stack([live.t for live in part])
    factor = torch.tensor([live.factor for live in part], device=g.device, dtype=torch.float64)
    e = denoise(x, t, rows)
    # the product in at least fp32: g is small and e may be half precision
    exact = torch.float64 if e.dtype == torch.float64 else torch.float32
    direction = factor.to(exact).view(-1, *[1] * (g.dim() - 1)) * g[rows].to(exact)
    total = (direction * e.to(exact)).sum()
    if penalties is not None and path.base is not None:
        with torch.no_grad():
            base = path.base(x.detach(), t, rows)
        penalty = (e - base).to(exact).square().flatten(1).mean(1)
        share = torch.tensor([live.share for live in part], device=g.device, dtype=exact)
        penalties.index_add_(0, rows, (share * penalty).detach().to(penalties.dtype))
        total = total + terms.kl_weight * (share * penalty).sum() / (terms.divisor or len(g))
    if not total.requires_grad:
        # what is optimised stands outside the network
        return
    terms.backward(terms.scale * total)
    if wants_x0 and path.x_0.grad is not None and x.grad is not None:
        _pass_on(path, part, x.grad / terms.scale)


def _pass_on(path: Path, part: list[LiveCall], into_x: Tensor) -> None:
    """From the scaled inputs of followed calls to ``x_0``; only a first call is followed."""
    assert path.x_0.grad is not None
    scale = path.route.levels[0].scale
    for live, gradient in zip(part, into_x, strict=True):
        if live.followed:
            path.x_0.grad[live.row] += scale * gradient


def three_stage(
    path: Path,
    plan: Plan,
    objective: Objective,
    *,
    terms: Terms | None = None,
    micro: MicroBatches | None = None,
    change_g: Callable[[Tensor], Tensor] | None = None,
) -> Outcome:
    """Carry out a plan in which no live call depends on an earlier live one.

    Args:
        change_g: for control experiments only: replaces g before stage 3.

    Raises:
        ValueError: the plan chains live calls; it needs one graph.
    """
    if not plan.is_one_step_deep(latents=path.is_steered):
        raise ValueError("this plan chains live calls: use the one-graph engine")
    sources = check_skips(path.skips, plan, steered=path.is_steered)
    if path.fast is not None and path.is_steered:
        raise ValueError("a fast rollout serves weights, not latents, noise or guidance")
    terms, micro, watch = terms or Terms(), micro or MicroBatches(), Stopwatch(path.x_0.device)
    linear = linear_path(path.route, plan, sources)
    with watch.stage("rollout"):
        rolled = rollout(path, plan, linear, micro=micro.rollout)
    with watch.stage("score"):
        divisor = terms.divisor or plan.batch
        losses, g, rewards = score_and_differentiate(
            objective, rolled.x_N, divisor=divisor, micro=micro.score, scale=terms.scale
        )
        if change_g is not None:
            g = change_g(g)
    with watch.stage("shortcut"):
        straight(path, linear, g, rolled.towards)
        pieces = _pieces(path, rolled.live, micro.shortcut or plan.batch, plan.most_live)
        penalties = shortcut(path, pieces, g, terms)
    calls = {"no_grad": calls_made(path.skips, plan) * plan.batch, "grad": sum(len(part) for part in pieces)}
    return Outcome(rolled.x_N, losses, rewards, g, watch.seconds, calls, penalties)
