"""How near a rule's gradient is to full backpropagation's: direction, bias and variance over many draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.bench.bench_job import Workbench
from sdo_cli.bench.variants import Variant
from sdo_cli.drawing.draw import make_route
from sdo_cli.finetune.loop import Job
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import find_rule
from sdo_cli.progress import Reporter
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.scoring.statistics import Estimate, estimate
from sdo_cli.seeding import keyed_generator


@dataclass(frozen=True)
class Nearness:
    """One rule against ``full`` on the same batches (noise and prompts fixed, the plan drawn again and again).

    Attributes:
        cosine: of a single draw's gradient to the full one, mean over batches and its standard error.
        cosine_of_mean: of the mean over the draws.
        variance: E|g - E g|² / |E g|², averaged over batches: 0 for rules without chance.
        error: E|g - full|² / |full|²: variance and bias together, scale included.
        draws: plans per batch.
    """

    cosine: Estimate
    cosine_of_mean: Estimate
    variance: float
    error: float
    draws: int


def draw_plan(job: Job, draw: int) -> Plan:
    """The rule's plan number ``draw``, of a stream that training does not use."""
    c = coefficients_of(make_route(job.family, job.draw_settings))
    spec, generator = job.recipe.gradient, keyed_generator(job.recipe.seed, "bench-plan", draw)
    return find_rule(spec.rule)(c.calls, job.global_batch, c, generator, **spec.options)


def same_plan(a: Plan, b: Plan) -> bool:
    return bool(
        torch.equal(a.mode, b.mode)
        and torch.equal(a.weight, b.weight)
        and torch.equal(a.ends, b.ends)
        and (a.repeats is None) == (b.repeats is None)
        and (a.repeats is None or b.repeats is None or torch.equal(a.repeats, b.repeats))
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def measure_nearness(
    bench: Workbench, full: Variant, *, batches: int, draws: int, reporter: Reporter
) -> dict[Variant, Nearness]:
    """``draws`` plans of every rule on each of ``batches`` batches; a rule without chance is drawn once.

    Variants that differ only in what they recompute share a gradient and are measured once.
    """
    rules = {variant.plan_name: variant for variant in bench.jobs}
    plans = {variant: [draw_plan(bench.jobs[variant], d) for d in range(draws)] for variant in rules.values()}
    for variant, drawn in plans.items():
        if all(same_plan(drawn[0], other) for other in drawn[1:]):
            plans[variant] = drawn[:1]
    reporter.phase("nearness to full", batches * (1 + sum(len(drawn) for drawn in plans.values())))
    found: dict[Variant, list[tuple[float, float, float, float]]] = {variant: [] for variant in rules.values()}
    for batch in range(batches):
        bench.gradient(full, batch, plan=draw_plan(bench.jobs[full], 0))
        reference = bench.flat_gradient()
        reporter.advance(1, "full")
        for variant, drawn in plans.items():
            gradients = []
            for plan in drawn:
                bench.gradient(variant, batch, plan=plan)
                gradients.append(bench.flat_gradient())
                reporter.advance(1, variant.plan_name)
            found[variant].append(_compare(torch.stack(gradients), reference))
    result = {}
    for variant in bench.jobs:
        rows = torch.tensor(found[rules[variant.plan_name]], dtype=torch.float64)
        count = len(plans[rules[variant.plan_name]])
        means = rows.mean(0).tolist()
        result[variant] = Nearness(estimate(rows[:, 0]), estimate(rows[:, 1]), means[2], means[3], count)
    return result


def _compare(gradients: Tensor, reference: Tensor) -> tuple[float, float, float, float]:
    """Single cosine, cosine of the mean, relative variance (unbiased), relative error; one batch ``[draws, P]``."""
    mean, count = gradients.mean(0), len(gradients)
    spread = (gradients - mean).square().sum().item() / max(1, count - 1)
    # |mean of n|² overestimates |E g|² by its own variance
    size = max(mean.square().sum().item() - spread / count, 1e-300)
    single = sum(cosine(g, reference) for g in gradients) / count
    error = (gradients - reference).square().sum(1).mean().item() / reference.square().sum().item()
    return single, cosine(mean, reference), spread / size, error
