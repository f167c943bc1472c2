"""The three-stage engine: rollout without a graph, score, shortcut (docs/architecture.md).

    1. Rollout   x_N and, for the live calls, the network's (scaled) inputs; no graph.
    2. Score     g = ∂J/∂x_N through decoder and reward only.
    3. Shortcut  re-run the network with a graph on the kept inputs and send back <sg(w_i g / p_i), e_i>.

The result equals one graph with the same live calls. Peak memory is the larger of (decoder + reward) and one
network call, and does not grow with the number of steps.

Where the plan shares its live calls out among several updates, stage 1 and 2 serve all of them; :mod:`.replay` makes
the later ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdo_cli.gradients.linear import LinearPath, linear_path
from sdo_cli.gradients.live import Kept, LiveCall, as_it_was, outputs_of, pieces_of, shares
from sdo_cli.gradients.outcome import Objective, Outcome, Stopwatch, Terms, micro_batches, score_and_differentiate
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.skipped import calls_made, check_skips
from sdo_cli.sampling.loop import Denoise, Path, RunCall, denoise_path
from sdo_cli.skipping.walking import Walk


@dataclass(frozen=True)
class MicroBatches:
    """Samples per piece in each stage; None takes the whole batch (never more, also when K > 1 calls are live)."""

    rollout: int | None = None
    score: int | None = None
    shortcut: int | None = None


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
    live, followed, share = plan.live, plan.mode == Mode.THROUGH, shares(plan)
    exact = path.skips is not None and path.skips.exact
    for mine in micro_batches(torch.arange(plan.batch), micro):
        rows, run = mine.to(path.x_0.device, non_blocking=True), path.begin()

        def call(i: int, x: Tensor, t: Tensor, rows: Tensor = rows, mine: Tensor = mine, run: RunCall = run) -> Tensor:
            parts = run(i, lambda: path.drawn(x, t, rows))
            e = path.join(parts, t, rows)
            for j in live[i, mine].nonzero().flatten().tolist():
                row = int(mine[j])
                factor, follow = linear.factor[i, row].item(), bool(followed[i, row])
                stored = run.kept(i, j, len(mine)) if exact and isinstance(run, Walk) else None
                found = LiveCall(x[j].clone(), t[j].clone(), row, factor, follow, share[i, row].item(), i, stored)
                if plan.turn is not None:
                    # laid out as they are read back from a checkpoint
                    found = replace(
                        found, x=found.x.contiguous(), turn=int(plan.turn[i, row]), e=e[j].contiguous().clone()
                    )
                kept.append(found)
            if wants_scales and len(parts) == 2:
                towards.append(Towards(t, rows, parts[1], linear.w[i, mine]))
            return e

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


@dataclass
class Sent:
    """What stage 3 finds out on its way.

    Attributes:
        penalties: of the regulariser, per sample ``[B]``; None when it is off.
        changes: |e - e of the rollout| / |e of the rollout| of the live calls, at a later update.
    """

    penalties: Tensor | None = None
    changes: list[Tensor] | None = None


def shortcut(
    path: Path,
    pieces: list[list[LiveCall]],
    g: Tensor,
    terms: Terms,
    *,
    gate: Tensor | None = None,
    later: bool = False,
) -> Sent:
    """Stage 3: accumulate ``Σ factor · (∂e/∂θ)ᵀ g`` into the parameters' gradients, and into ``x_0.grad``.

    Args:
        gate: of the samples ``[B]``, what the penalty near the base is multiplied with; None: 1.
        later: the weights have changed since the rollout: by how much is looked at, and held back where terms say so.
    """
    # scales have their whole gradient by then
    denoise = path.steered.held() if path.steered else path.denoise
    sent = Sent(torch.zeros(len(g), device=g.device) if terms.kl_weight else None, [] if later else None)
    for number, part in enumerate(pieces):
        backward = terms.closing if number == len(pieces) - 1 else terms.backward
        # with its backward pass: blocks that are recomputed skip the same units
        with as_it_was(path, part):
            _send_back(path, denoise, part, g, terms=replace(terms, backward=backward), sent=sent, gate=gate)
    return sent


def _send_back(
    path: Path,
    denoise: Denoise,
    part: list[LiveCall],
    g: Tensor,
    *,
    terms: Terms,
    sent: Sent,
    gate: Tensor | None,
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
    share = torch.tensor([live.share for live in part], device=g.device, dtype=exact)
    held = share if gate is None else share * gate[rows].to(exact)
    # behind a closed gate the base is not asked
    if sent.penalties is not None and path.base is not None and (gate is None or bool(held.any())):
        with torch.no_grad():
            base = path.base(x.detach(), t, rows)
        penalty = (e - base).to(exact).square().flatten(1).mean(1)
        sent.penalties.index_add_(0, rows, (held * penalty).detach().to(sent.penalties.dtype))
        total = total + terms.kl_weight * (held * penalty).sum() / (terms.divisor or len(g))
    then = [live.e for live in part if live.e is not None]
    # a call that is only there to be in step has none
    if sent.changes is not None and then:
        before = torch.stack(then).to(exact)
        gap = (e.to(exact) - before).flatten(1)
        sent.changes.append((gap.detach().norm(dim=1) / before.flatten(1).norm(dim=1)).cpu())
        if terms.proximal:
            total = total + terms.proximal * (share * gap.square().mean(1)).sum() / (terms.divisor or len(g))
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
    keep: bool = False,
) -> Outcome:
    """Carry out a plan in which no live call depends on an earlier live one.

    Args:
        change_g: for control experiments only: replaces g before stage 3.
        keep: leave the live calls in the outcome, also where there is one update.

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
        extra = 0
        if plan.turn is not None and not path.draws_what_is_trained:
            extra = outputs_of(path, rolled.live, micro.shortcut or plan.batch, plan.most_live)
    with watch.stage("score"):
        divisor = terms.divisor or plan.batch
        scored, g = score_and_differentiate(
            objective, rolled.x_N, divisor=divisor, micro=micro.score, scale=terms.scale
        )
        if change_g is not None:
            g = change_g(g)
    with watch.stage("shortcut"):
        straight(path, linear, g, rolled.towards)
        mine = [live for live in rolled.live if live.turn == 0]
        pieces = pieces_of(path, mine, micro.shortcut or plan.batch, plan.of_updates(0).most_live)
        sent = shortcut(path, pieces, g, terms, gate=terms.gate(scored.uncertainty))
    made = calls_made(path.skips, plan) * plan.batch + extra
    calls = {"no_grad": made, "grad": sum(len(part) for part in pieces)}
    found = Outcome(rolled.x_N, scored.losses, scored.rewards, g, watch.seconds, calls, sent.penalties)
    found.uncertainty = scored.uncertainty
    if keep or plan.turn is not None:
        x_N, g = rolled.x_N.contiguous(), g.contiguous()
        found.kept = Kept(plan, x_N, g, scored.losses, scored.rewards, rolled.live, scored.uncertainty)
    return found
