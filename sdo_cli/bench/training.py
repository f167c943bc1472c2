"""Reward and judge gain on held-out prompts when every rule gets the same counted FLOPs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdo_cli.bench.bench_job import Workbench, new_adapter, set_block_checkpointing
from sdo_cli.bench.cost import CostTable
from sdo_cli.bench.parts import counts, total
from sdo_cli.bench.variants import Variant
from sdo_cli.errors import RecipeFault
from sdo_cli.progress import Reporter
from sdo_cli.scoring.statistics import Estimate, Gain, paired_gain
from sdo_cli.training.job import Job, plan_step
from sdo_cli.training.loop import train

NO_PROMPTS = "validation.prompts: the training part needs held-out prompts; add them, or choose --part cost"


@dataclass(frozen=True)
class TrainedRun:
    """One rule, one seed.

    Attributes:
        scores: after training, by reward, ``[prompts, seeds]``.
        steps, flops, seconds: optimizer steps, counted FLOPs and wall-clock of the training alone.
    """

    seed: int
    steps: int
    flops: float
    seconds: float
    scores: dict[str, Tensor]


@dataclass(frozen=True)
class TrainedRule:
    """Attributes:
    gains: by reward, over prompts, the training seeds averaged first.
    by_seed: by reward, the mean gain of each training seed.
    """

    runs: list[TrainedRun]
    gains: dict[str, Gain]
    by_seed: dict[str, list[float]]


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    before: scores of the model without an adapter, by reward, ``[prompts, seeds]``.
    """

    budget_flops: float
    before: dict[str, Tensor]
    rules: dict[Variant, TrainedRule]

    def against(self, variant: Variant, other: Variant, reward: str) -> Estimate:
        """Mean difference of two rules on the same prompts, training seeds averaged, with its error over prompts."""
        scores = [torch.stack([run.scores[reward] for run in self.rules[v].runs]).mean(0) for v in (other, variant)]
        return paired_gain(*scores).difference


def affordable_steps(job: Job, variant: Variant, table: CostTable, budget: float) -> tuple[int, float]:
    """Optimizer steps whose counted FLOPs stay within ``budget``, and those FLOPs."""
    spent, steps, checkpointing = 0.0, 0, variant.checkpointing(job.recipe)
    while True:
        plan = plan_step(job, steps // job.recipe.rollout.updates)
        cost = total(counts(job, plan, checkpointing), table.part_flops)
        if spent + cost > budget:
            return steps, spent
        spent, steps = spent + cost, steps + 1


def compare_training(
    bench: Workbench, table: CostTable, variants: list[Variant], *, iterations: int, seeds: int, reporter: Reporter
) -> Iterator[Comparison]:
    """Train every rule ``seeds`` times with the FLOPs of ``iterations`` steps of ``sdo`` (else of the first rule).

    Yields:
        The comparison so far, after every run.

    Raises:
        RecipeFault: the recipe has no held-out prompts, or a rule cannot afford a single step.
    """
    if bench.validation is None:
        raise RecipeFault([NO_PROMPTS])
    reference = next((v for v in variants if v.name == "sdo"), variants[0])
    budget = iterations * table.variants[reference].mean_flops
    poor = [v.name for v in variants if not affordable_steps(bench.jobs[v], v, table, budget)[0]]
    if poor:
        raise RecipeFault([f"--iterations: {', '.join(poor)} cannot afford one step with this budget; give more"])
    # without an adapter that was moved for the other parts: a fresh one changes nothing
    new_adapter(bench, 0)
    reporter.phase("held-out, before", len(bench.validation.pairs))
    before = bench.validation.measure(bench.any_job.family, reporter)
    runs: dict[Variant, list[TrainedRun]] = {}
    for seed in range(seeds):
        for variant in variants:
            run = _train_once(bench, table, variant, seed, budget, reporter)
            runs.setdefault(variant, []).append(run)
            yield Comparison(budget, before, {v: _summarise(before, found) for v, found in runs.items()})


def _train_once(
    bench: Workbench, table: CostTable, variant: Variant, seed: int, budget: float, reporter: Reporter
) -> TrainedRun:
    assert bench.validation is not None
    new_adapter(bench, seed)
    job = bench.jobs[variant]
    job = replace(job, recipe=replace(job.recipe, seed=seed))
    steps, flops = affordable_steps(job, variant, table, budget)
    # another seed may draw dearer plans
    steps = max(1, steps)
    # the learning rate's schedule spans the steps this rule can afford
    job = replace(job, recipe=replace(job.recipe, max_train_steps=steps))
    set_block_checkpointing(job, variant)
    reporter.phase(f"{variant.name}, seed {seed}", steps)
    start = time.perf_counter()
    for result in train(job):
        reporter.advance(1, f"loss {result.loss:.4f}")
    seconds = time.perf_counter() - start
    reporter.phase(f"{variant.name}, seed {seed}, held-out", len(bench.validation.pairs))
    return TrainedRun(seed, steps, flops, seconds, bench.validation.measure(job.family, reporter))


def _summarise(before: dict[str, Tensor], runs: list[TrainedRun]) -> TrainedRule:
    gains, by_seed = {}, {}
    for name, base in before.items():
        after = torch.stack([run.scores[name] for run in runs])
        gains[name] = paired_gain(base, after.mean(0))
        by_seed[name] = [(scores - base).double().mean().item() for scores in after]
    return TrainedRule(runs, gains, by_seed)
