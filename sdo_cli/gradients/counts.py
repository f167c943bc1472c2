"""How often each part of an iteration runs, read off a plan: what its cost is put together from."""

from sdo_cli.gradients.plan import Mode, Plan

# (through, what is recomputed) of a live call to the name of its part
LIVE = {
    (False, "none"): "live call",
    (True, "none"): "live call, through",
    (False, "calls"): "live call, recomputed",
    (True, "calls"): "live call, through, recomputed",
    (False, "blocks"): "live call, blocks recomputed",
    (True, "blocks"): "live call, through, blocks recomputed",
}


def counts(
    plan: Plan,
    checkpointing: str,
    *,
    slice_size: int,
    regularised: bool = False,
    rollout_share: float = 1.0,
    live_share: float = 1.0,
    updates: int = 1,
    rescored: bool = False,
    drawn_by_other: bool = False,
    sharp: bool = False,
) -> dict[str, float]:
    """How often each part runs in one step, slice by slice of its global batch; of several updates, in their mean.

    Three stages run every call without a graph and the live ones again with one; one graph runs each call once.

    Args:
        updates: that the plan's live calls are shared out among, on one rollout.
        rescored: every update after the first scores again, and looks at all live calls so far.
        drawn_by_other: the rollout is not of what is trained, whose outputs at the live calls are asked for as well.
        sharp: live calls are made once more, at moved weights.
        slice_size: samples of one pass.
        regularised: the step has a ``kl_weight``.
        rollout_share, live_share: of the network that rollouts, and live calls, compute under a skip plan.
    """
    found = dict.fromkeys(("call", "score", *LIVE.values()), 0.0)
    for part in _slices(plan, slice_size):
        for name, number in _slice_counts(part, checkpointing).items():
            found[name] += number
    found["call"] *= rollout_share / updates
    for name in LIVE.values():
        found[name] *= live_share / updates
    if updates > 1:
        live = sum(found[name] for name in LIVE.values())
        found["call"] += drawn_by_other * live
        found["call"] += rescored * live * (updates * (updates + 1) / 2 - 1) / updates
        found["score"] *= 1.0 if rescored else 1 / updates
    for name in LIVE.values():
        found[name] *= 2 if sharp else 1
    # the regulariser asks the base network once for every live call
    if regularised:
        found["call"] += sum(found[name] for name in LIVE.values())
    return {name: number for name, number in found.items() if number}


def _slices(plan: Plan, size: int) -> list[Plan]:
    return [plan.rows(slice(start, start + size)) for start in range(0, plan.batch, size)]


def _slice_counts(plan: Plan, checkpointing: str) -> dict[str, float]:
    repeats = 0 if plan.repeats is None else len(plan.repeats)
    held = LIVE[False, "blocks" if checkpointing == "blocks" else "none"]
    if plan.is_one_step_deep():
        live = plan.live.sum().item() / plan.batch
        return {"call": plan.calls_run + repeats, held: live + repeats, "score": 1.0 + repeats}
    live_calls = plan.live.any(1)
    through = (plan.mode == Mode.THROUGH).any(1)
    # what comes first has an input without a graph
    first = int(live_calls.long().argmax())
    followed = int(through[first + 1 :].sum())
    found = {"call": float(plan.calls_run - int(live_calls.sum()) + repeats), "score": 1.0 + repeats}
    for name, number in (
        (LIVE[False, checkpointing], int(live_calls.sum()) - followed),
        (LIVE[True, checkpointing], followed),
        (held, repeats),
    ):
        found[name] = found.get(name, 0.0) + number
    return found


def held_at_once(plan: Plan, slice_size: int) -> int:
    """Most live calls of one slice whose graphs are there together; 0 where three stages serve the plan."""
    slices = _slices(plan, slice_size)
    return max(0 if part.is_one_step_deep() else int(part.live.any(1).sum()) for part in slices)
