"""How near a rule's gradient is to full backpropagation's: direction, bias and variance over many draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.bench.bench_job import Workbench
from sdo_cli.bench.variants import Variant
from sdo_cli.gradients.plan import Plan
from sdo_cli.progress import Reporter
from sdo_cli.scoring.statistics import Estimate, estimate
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.job import Job, make_plan


@dataclass(frozen=True)
class Nearness:
    """One rule against ``full`` on the same batches (noise and prompts fixed, the plan drawn again and again).

    Attributes:
        cosine: of a single draw's gradient to the full one, mean over batches and its standard error.
        cosine_of_mean: of the mean over the draws.
        variance: Σ E|g - E g|² / Σ |E g|², sums over batches: 0 for rules without chance, None where too few draws
            cannot tell.
        error: E|g - full|² / |full|²: variance and bias together, scale included.
        draws: plans per batch.
    """

    cosine: Estimate
    cosine_of_mean: Estimate
    variance: float | None
    error: float
    draws: int


def draw_plan(job: Job, draw: int) -> Plan:
    """The rule's plan number ``draw``, of a stream that training does not use."""
    return make_plan(job, keyed_generator(job.recipe.seed, "bench-plan", draw))


def same_plan(a: Plan, b: Plan) -> bool:
    return bool(
        torch.equal(a.mode, b.mode)
        and torch.equal(a.weight, b.weight)
        and torch.equal(a.ends, b.ends)
        and (a.repeats is None) == (b.repeats is None)
        and (a.repeats is None or b.repeats is None or torch.equal(a.repeats, b.repeats))
    )


def _always_the_same(job: Job) -> bool:
    first, *others = (draw_plan(job, draw) for draw in range(16))
    return all(same_plan(first, other) for other in others)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def measure_nearness(
    bench: Workbench, full: Variant, *, batches: int, draws: int, reporter: Reporter
) -> dict[Variant, Nearness]:
    """``draws`` plans of every rule on each of ``batches`` batches; a rule without chance is drawn once.

    Variants that differ only in what they recompute share a gradient and are measured once.
    """
    rules = {variant.plan_name: variant for variant in bench.jobs}
    without_chance = {variant for variant in rules.values() if _always_the_same(bench.jobs[variant])}
    count = {variant: 1 if variant in without_chance else draws for variant in rules.values()}
    reporter.phase("nearness to full", batches * (1 + sum(count.values())))
    found: dict[Variant, list[tuple[float, float, float, float, float]]] = {variant: [] for variant in rules.values()}
    for batch in range(batches):
        bench.gradient(full, batch, plan=draw_plan(bench.jobs[full], 0))
        reference = bench.flat_gradient()
        reporter.advance(1, "full")
        for variant, number in count.items():
            gradients = []
            # other plans on every batch, so that batches are independent
            for draw in range(batch * number, (batch + 1) * number):
                plan = draw_plan(bench.jobs[variant], draw)
                bench.gradient(variant, batch, plan=plan)
                gradients.append(bench.flat_gradient())
                reporter.advance(1, variant.plan_name)
            found[variant].append(_compare(torch.stack(gradients), reference))
    result = {}
    for variant in bench.jobs:
        first = rules[variant.plan_name]
        rows = torch.tensor(found[first], dtype=torch.float64)
        spread, size, error = rows[:, 2].sum().item(), rows[:, 3].sum().item(), rows[:, 4].mean().item()
        # one draw tells nothing of a rule with chance in it
        known = size > 0 and (draws > 1 or first in without_chance)
        result[variant] = Nearness(
            estimate(rows[:, 0]), estimate(rows[:, 1]), spread / size if known else None, error, count[first]
        )
    return result


def _compare(gradients: Tensor, reference: Tensor) -> tuple[float, float, float, float, float]:
    """One batch ``[draws, P]``: single cosine, cosine of the mean, E|g - E g|², |E g|² (unbiased), relative error."""
    mean, count = gradients.mean(0), len(gradients)
    spread = (gradients - mean).square().sum().item() / max(1, count - 1)
    # |mean of n|² overestimates |E g|² by its own variance
    size = mean.square().sum().item() - spread / count
    single = sum(cosine(g, reference) for g in gradients) / count
    error = (gradients - reference).square().sum(1).mean().item() / reference.square().sum().item()
    return single, cosine(mean, reference), spread, size, error
