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
from sdo_cli.finetune.loop import Job, plan_step, train
from sdo_cli.progress import Reporter
from sdo_cli.scoring.statistics import Gain, paired_gain


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
    budget_flops: float
    before: dict[str, Tensor]
    rules: dict[Variant, TrainedRule]


def affordable_steps(job: Job, variant: Variant, table: CostTable, budget: float) -> tuple[int, float]:
    """Optimizer steps whose counted FLOPs stay within ``budget``, and those FLOPs."""
    spent, steps, checkpointing = 0.0, 0, variant.checkpointing(job.recipe)
    while True:
        plan = plan_step(job, steps)
        cost = job.recipe.gradient_accumulation_steps * total(counts(plan, checkpointing), table.part_flops)
        if spent + cost > budget:
            return steps, spent
        spent, steps = spent + cost, steps + 1


def compare_training(
    bench: Workbench, table: CostTable, variants: list[Variant], *, iterations: int, seeds: int, reporter: Reporter
) -> Iterator[Comparison]:
    """Train every rule ``seeds`` times with the FLOPs of ``iterations`` steps of ``sdo`` (else of the first rule).

    Yields:
        The comparison so far, after every seed.

    Raises:
        RecipeFault: the recipe has no held-out prompts, or a rule cannot afford a single step.
    """
    if bench.validation is None:
        raise RecipeFault(["validation.prompts: the training part needs held-out prompts; add them, or --part cost"])
    reference = next((v for v in variants if v.name == "sdo"), variants[0])
    budget = iterations * table.variants[reference].mean_flops
    runs: dict[Variant, list[TrainedRun]] = {variant: [] for variant in variants}
    pairs = len(bench.validation.pairs)
    reporter.phase("held-out, before", pairs)
    before = bench.validation.measure(bench.any_job.family, reporter)
    for seed in range(seeds):
        for variant in variants:
            runs[variant].append(_train_once(bench, table, variant, seed, budget, reporter))
        yield Comparison(budget, before, {v: _summarise(before, found) for v, found in runs.items()})


def _train_once(
    bench: Workbench, table: CostTable, variant: Variant, seed: int, budget: float, reporter: Reporter
) -> TrainedRun:
    assert bench.validation is not None
    new_adapter(bench, seed)
    job = bench.jobs[variant]
    job = replace(job, recipe=replace(job.recipe, seed=seed))
    steps, flops = affordable_steps(job, variant, table, budget)
    if steps == 0:
        raise RecipeFault([f"--iterations: {variant.name} cannot afford one step with this budget; give more"])
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
