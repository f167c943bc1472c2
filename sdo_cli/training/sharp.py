"""Gradients at weights that were moved the way the loss grows (Foret et al. 2021, SAM, arXiv 2010.01412).

    g = ∇S(θ),   g' = ∇S(θ + ρ g / |g|),   S the step's surrogate: Σ <sg(w_i g_N / p_i), e_θ(x_i)> and the penalties

The rollout, g_N and the gate are those of θ: only the live calls are made again, on the same inputs. |g| is that of all
trained weights together and of the whole global batch, so neither micro-batches nor processes change the way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sdo_cli.gradients.outcome import Outcome, added
from sdo_cli.gradients.replay import again
from sdo_cli.parallel.world import World
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job
from sdo_cli.training.passes import path_and_micro, slices_of, terms_of


def sharpen(
    job: Job, order: PromptOrder, step: int, outcomes: list[Outcome], *, update: int = 0, scale: float = 1.0
) -> list[Outcome]:
    """Put the gradient at the moved weights in the place of that at the weights as they are; all processes call it.

    Before, the parameters hold this process's part of the gradient; after, the sum of all. Where that is zero or not
    finite there is no way to go, and it stays.

    Args:
        step: the rollout's number.
        outcomes: of the passes that made the gradient, by slice, with what they kept.
        update: whose live calls are made again.

    Returns:
        The outcomes, with what the second pass cost.
    """
    job.world.add_gradients(job.parameters)
    with moved(job.parameters, job.recipe.gradient.weight_sharpness, job.world) as is_moved:
        if not is_moved:
            return outcomes
        terms, found = terms_of(job, scale), []
        for part, outcome in zip(slices_of(job), outcomes, strict=True):
            path, micro = path_and_micro(job, order, step, part)
            cost = again(path, outcome, update, terms=terms, micro=micro)
            seconds = added([outcome.seconds, cost.seconds])
            calls = {kind: outcome.calls[kind] + cost.calls[kind] for kind in outcome.calls}
            found.append(replace(outcome, seconds=seconds, calls=calls))
        job.world.add_gradients(job.parameters)
    return found


@contextmanager
def moved(parameters: list[nn.Parameter], rho: float, world: World) -> Iterator[bool]:
    """With the weights at θ + ρ g / |g|, g their gradients, which are forgotten; afterwards at θ again, to the bit.

    False, and nothing is done, where |g| is zero or not finite.
    """
    # one decides for all, who hold the same gradient
    length = world.share(lambda: length_of([p.grad for p in parameters if p.grad is not None]))
    if not 0 < length < float("inf"):
        yield False
        return
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad.to(parameter.dtype), alpha=rho / length)
                parameter.grad = None
    try:
        yield True
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def length_of(gradients: list[Tensor]) -> float:
    """Of all of them together, summed up in float64 wherever they are."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    if not norms:
        return 0.0
    return float(torch.stack([norm.double().cpu() for norm in norms]).square().sum().sqrt())
