"""Later updates on one rollout: the network is run again on inputs that were kept, as its weights are by then.

The rollout is what an iteration costs. Its live calls are shared out among R updates; the first is the three-stage
engine's, and the others send back

    <sg(w_i g / p_i), e_θ(x_i)>,       θ as it is now, x_i of the rollout,

p_i being the probability of the call in one update: at a vanishing learning rate R updates add up to R draws. What
grows old is held by: ``rescore`` (g is taken where the linear path puts the image by now), ``proximal`` (a penalty on
the way from the rollout's outputs), and the changes that are handed back, by which the caller ends it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sdo_cli.gradients.live import Kept, LiveCall, outputs_of, pieces_of
from sdo_cli.gradients.outcome import Objective, Outcome, Scored, Stopwatch, Terms, score_and_differentiate
from sdo_cli.gradients.three_stage import MicroBatches, shortcut
from sdo_cli.sampling.loop import Path


def replay(
    path: Path,
    kept: Kept,
    update: int,
    objective: Objective,
    *,
    terms: Terms | None = None,
    micro: MicroBatches | None = None,
    rescore: bool = False,
) -> Outcome:
    """Gradients of update ``update`` (from 1), accumulated into the parameters.

    Args:
        path: the rollout's; its prompts encoded as they are by now.
        rescore: take losses and g where the linear path puts the final latents by what the network has changed at the
            live calls so far; else those of the rollout are taken again.
    """
    terms, micro, watch = terms or Terms(), micro or MicroBatches(), Stopwatch(path.x_0.device)
    size = micro.shortcut or kept.plan.batch
    x_N, scored, g, looked = kept.x_N, Scored(kept.losses, kept.rewards, kept.uncertainty), kept.g, 0
    if rescore:
        with watch.stage("rollout"):
            x_N, looked = moved(path, kept, update, size)
        with watch.stage("score"):
            scored, g = score_and_differentiate(
                objective, x_N, divisor=terms.divisor or len(x_N), micro=micro.score, scale=terms.scale
            )
    with watch.stage("shortcut"):
        mine = [live for live in kept.live if live.turn == update]
        pieces = pieces_of(path, mine, size, kept.plan.of_updates(update).most_live)
        sent = shortcut(path, pieces, g, terms, gate=terms.gate(scored.uncertainty), later=True)
    changes = torch.cat(sent.changes) if sent.changes else torch.zeros(0)
    calls = {"no_grad": looked, "grad": sum(len(part) for part in pieces)}
    found = Outcome(x_N, scored.losses, scored.rewards, g, watch.seconds, calls, sent.penalties, changes=changes)
    found.uncertainty, found.kept = scored.uncertainty, kept
    return found


def again(
    path: Path,
    outcome: Outcome,
    update: int,
    *,
    terms: Terms | None = None,
    micro: MicroBatches | None = None,
) -> Outcome:
    """The live calls of one update once more, with the same inputs, g and gate, at the weights of now.

    Args:
        outcome: of :func:`replay`, or of the three-stage engine, with what it kept.

    Returns:
        Seconds and calls are this pass's, all else the outcome's.
    """
    kept, watch, terms, micro = outcome.kept, Stopwatch(path.x_0.device), terms or Terms(), micro or MicroBatches()
    assert kept is not None
    with watch.stage("shortcut"):
        mine = [live for live in kept.live if live.turn == update]
        pieces = pieces_of(path, mine, micro.shortcut or kept.plan.batch, kept.plan.of_updates(update).most_live)
        gate = terms.gate(outcome.uncertainty)
        shortcut(path, pieces, outcome.g, terms, gate=gate, later=update > 0)
    return replace(outcome, seconds=watch.seconds, calls={"no_grad": 0, "grad": sum(len(part) for part in pieces)})


@torch.no_grad()
def moved(path: Path, kept: Kept, update: int, size: int) -> tuple[Tensor, int]:
    """Final latents of the linear path by now, ``x_N + Σ (w_i / p_i) (e_θ(x_i) - e_i)``; and how many calls it took.

    The sum runs over the live calls of all updates so far, this one included, p_i their probability to be among them;
    how their inputs would have moved is left out.
    """
    so_far = [live for live in kept.live if live.turn <= update]
    now = [replace(live) for live in so_far]
    made = outputs_of(path, now, size, kept.plan.of_updates(0, update).most_live)
    x_N = kept.x_N.clone()
    for before, after in zip(so_far, now, strict=True):
        # factors have the probability of one update
        x_N[before.row] += before.factor / (update + 1) * change_of(before, after).to(x_N.dtype)
    return x_N, made


def change_of(before: LiveCall, after: LiveCall) -> Tensor:
    """Between the outputs of two runs of one call, in at least fp32."""
    assert before.e is not None and after.e is not None
    return after.e.to(torch.promote_types(after.e.dtype, torch.float32)) - before.e
