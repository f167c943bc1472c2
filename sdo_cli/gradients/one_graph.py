"""The one-graph engine: the whole trajectory under autograd, live calls checkpointed. Serves every plan."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdo_cli.gradients.outcome import Objective, Outcome, Stopwatch, Terms
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.sampling.loop import Path, denoise_path


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` broadcast over the other dimensions of ``like``."""
    return values.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


class _Calls:
    """The network as the plan wants it at each call; counts, and gathers the regulariser."""

    def __init__(self, path: Path, plan: Plan, terms: Terms, checkpointing: bool) -> None:
        self.path, self.plan, self.terms, self.checkpointing = path, plan, terms, checkpointing
        self.rows, self.live_calls, self.graphs = path.rows, 0, plan.graphs
        self.penalties: Tensor | None = None

    def __call__(self, i: int, x: Tensor, t: Tensor) -> Tensor:
        live, through = self.plan.live[i], self.plan.mode[i] == Mode.THROUGH
        weight = self.plan.weight[i] * live
        if self.graphs[i]:
            self.live_calls += self.plan.batch
            parts = self._run(self._followed(i, x, through), t)
            if self.terms.kl_weight:
                self._add_penalty(self.path.join(parts, t, self.rows), x, t, live)
            # same value, gradient times the plan's weight (0 where frozen)
            if not bool((weight == 1).all()):
                parts = tuple(part.detach() + _per_sample(weight, part) * (part - part.detach()) for part in parts)
        else:
            with torch.no_grad():
                parts = self.path.split(x.detach(), t, self.rows)
        # guidance stands outside the network: its scale is part of the linear path
        e = self.path.join(parts, t, self.rows)
        if not self.plan.as_epsilon:
            return e
        # ε = n_x x + n_e e is what is held constant, so e follows x the other way where the call does not
        level = self.path.route.levels[i]
        inside = through if self.plan.nested is None else through * self.plan.nested[i]
        rest = -level.eps_of_x / (level.eps_of_e * level.scale) * (1 - weight * inside)
        return e + _per_sample(rest, x) * (x - x.detach())

    def _followed(self, i: int, x: Tensor, through: Tensor) -> Tensor:
        """The call's input as the network sees it: a constant, or with its gradient, or a part of that."""
        if self.plan.nested is not None:
            if not bool(((self.plan.whole or self.plan).mode[i] == Mode.THROUGH).any()):
                # no gradient of 0, which would cost as much as any; parts in step go back alike
                return x.detach()
            part = through * self.plan.nested[i]
            return x.detach() + _per_sample(part, x) * (x - x.detach())
        return x if bool(through.all()) else torch.where(_per_sample(through, x) > 0, x, x.detach())

    def _run(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.checkpointing:
            return checkpoint(self.path.split, x, t, self.rows, use_reentrant=False)
        return self.path.split(x, t, self.rows)

    def _add_penalty(self, e: Tensor, x: Tensor, t: Tensor, live: Tensor) -> None:
        if self.path.base is None:
            return
        with torch.no_grad():
            base = self.path.base(x.detach(), t, self.rows)
        share = live / self.plan.live.sum(0).clamp(min=1)
        penalty = share.to(e) * (e - base).square().flatten(1).mean(1)
        self.penalties = penalty if self.penalties is None else self.penalties + penalty


def one_graph(
    path: Path, plan: Plan, objective: Objective, *, terms: Terms | None = None, checkpointing: bool = True
) -> Outcome:
    """Carry out any plan. With ``checkpointing`` each live call is recomputed in the backward pass."""
    if path.skips is not None or path.fast is not None:
        raise ValueError("a rollout under a skip plan, or of another network, is not walked on one graph")
    terms, watch = terms or Terms(), Stopwatch(path.x_0.device)
    call, divisor = _Calls(path, plan, terms, checkpointing), terms.divisor or plan.batch
    with watch.stage("forward"):
        x_N = denoise_path(path, call, endpoint=plan.endpoint, last=plan.last)
        if x_N.requires_grad:
            x_N.retain_grad()
        else:
            # nothing live: the reward still has a gradient to report
            x_N.requires_grad_()
        scored = objective(x_N, path.rows)
        total, penalties = scored.losses.sum() / divisor, call.penalties
        if penalties is not None:
            gate = terms.gate(scored.uncertainty)
            penalties = penalties if gate is None else penalties * gate.to(penalties)
            total = total + terms.kl_weight * penalties.sum() / divisor
    with watch.stage("backward"):
        terms.closing(terms.scale * total)
    g = x_N.grad / terms.scale if x_N.grad is not None else torch.zeros_like(x_N)
    for leaf in path.outside if terms.scale != 1 else ():
        if leaf.grad is not None:
            leaf.grad /= terms.scale
    run = plan.calls_run * plan.batch
    calls = {"no_grad": run - call.live_calls, "grad": call.live_calls}
    penalties = None if penalties is None else penalties.detach()
    found = Outcome(x_N.detach(), scored.losses.detach(), scored.rewards, g, watch.seconds, calls, penalties)
    found.uncertainty = scored.uncertainty
    return found
