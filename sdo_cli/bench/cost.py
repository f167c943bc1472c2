"""Seconds, calls and FLOPs of an iteration, every variant interleaved in one run after a warm-up."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from sdo_cli.bench.bench_job import Workbench
from sdo_cli.bench.parts import Parts, counts, make_parts, total, without_recomputation
from sdo_cli.bench.variants import Variant
from sdo_cli.estimate.flops import count_flops
from sdo_cli.gradients.outcome import added
from sdo_cli.progress import Reporter
from sdo_cli.training.job import Job, plan_step

# a bare part is much shorter than an iteration: the mean of a few in a row has the same share of noise
PART_SECONDS = 0.3
# plans are free to draw: their mean cost is counted over many
PLANS = 256


@dataclass
class Cost:
    """One variant. Seconds and calls are per iteration (one global batch).

    Attributes:
        seconds: of every round; ``by_stage`` likewise.
        calls: network calls with and without a graph, per sample, mean over the measured rounds.
        flops: torch's counter over one iteration (step 0).
        predicted_flops: the same iteration put together from the counted parts.
        mean_flops: put together from parts, mean over many draws of the plan.
        bare_flops, bare_seconds: of the same number of bare parts, no live call's forward run again; FLOPs are means
            over the same plans, seconds of every round, timed right after the iteration.
        recomputed: what its live calls recompute: ``none``, ``blocks`` or ``calls``.
    """

    seconds: list[float] = field(default_factory=list)
    by_stage: list[dict[str, float]] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    predicted_flops: float = 0.0
    mean_flops: float = 0.0
    bare_flops: float = 0.0
    bare_seconds: list[float] = field(default_factory=list)
    recomputed: str = "none"

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    def ratio(self, other: "Cost") -> float:
        """Median over the rounds of time against another variant's of the same round."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    @property
    def stages(self) -> dict[str, float]:
        """Median seconds by stage; a rule may need one graph in one round and stages in another."""
        names = dict.fromkeys(name for stages in self.by_stage for name in stages)
        return {name: median(stages.get(name, 0.0) for stages in self.by_stage) for name in names}

    @property
    def over_bare(self) -> float:
        return median(a / b for a, b in zip(self.seconds, self.bare_seconds, strict=True))


@dataclass
class CostTable:
    """Attributes:
    part_seconds: by part, every time it was timed. part_flops: by part, torch's counter.
    """

    variants: dict[Variant, Cost]
    part_seconds: dict[str, list[float]]
    part_flops: dict[str, float]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one run."""
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def _mean_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Mean over as many runs in a row as take about ``PART_SECONDS``."""
    repeats = max(1, round(PART_SECONDS / max(1e-9, timed(run, device))))
    return timed(lambda: [run() for _ in range(repeats)], device) / repeats


def measure_cost(bench: Workbench, *, rounds: int, reporter: Reporter) -> CostTable:
    """Count FLOPs; then one warm-up round and ``rounds`` in which every variant has its turn (0: no timing).

    A variant that does not fit into the GPU's memory is noted and left out, of the workbench too.
    """
    parts = make_parts(bench)
    table = CostTable(
        {variant: Cost(recomputed=variant.checkpointing(job.recipe)) for variant, job in bench.jobs.items()},
        {name: [] for name in parts.run},
        {},
    )
    reporter.phase("counting FLOPs", len(parts.run) + len(bench.jobs))
    for name, run in parts.run.items():
        table.part_flops[name] = count_flops(run)
        reporter.advance(1, name)
    for variant in list(table.variants):
        _where_it_fits(bench, table, variant, partial(_count, bench, table, variant), reporter)
    if rounds == 0:
        return table
    reporter.phase("timing", (rounds + 1) * len(table.variants))
    for number in range(rounds + 1):
        for variant in list(table.variants):
            run = partial(_one_round, bench, table, parts, variant, number)
            _where_it_fits(bench, table, variant, run, reporter)
    return table


def _where_it_fits(
    bench: Workbench, table: CostTable, variant: Variant, run: Callable[[], object], reporter: Reporter
) -> None:
    try:
        run()
    except torch.OutOfMemoryError:
        del table.variants[variant]
        bench.leave_out(variant, reporter)
    reporter.advance(1, variant.name)


def _one_round(bench: Workbench, table: CostTable, parts: Parts, variant: Variant, number: int) -> None:
    """One iteration, and its bare parts right after it: a shared machine changes its pace by the minute."""
    cost, device, keep = table.variants[variant], bench.any_job.family.device, number > 0
    one_iteration(bench, variant, cost, step=number, keep=keep)
    bare_counts = without_recomputation(_counts(bench.jobs[variant], variant, number))
    bare = {name: _mean_seconds(parts.run[name], device) for name in bare_counts}
    if keep:
        for name, seconds in bare.items():
            table.part_seconds[name].append(seconds)
        cost.bare_seconds.append(total(bare_counts, bare))


def one_iteration(bench: Workbench, variant: Variant, cost: Cost, *, step: int, keep: bool = True) -> None:
    """Everything from noise to the optimizer's step (with learning rate 0, so that all variants see one adapter).

    Of several updates on one rollout all are made, and their mean is noted.

    Args:
        keep: note seconds and calls in ``cost``; False for a warm-up.
    """
    optimizer = torch.optim.AdamW(bench.parameters, lr=0.0, weight_decay=0.0)
    outcomes = []

    def iteration() -> None:
        for found in bench.rollout(variant, step):
            outcomes.extend(found)
            torch.nn.utils.clip_grad_norm_(bench.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = timed(iteration, bench.any_job.family.device)
    if not keep:
        return
    updates = bench.jobs[variant].recipe.rollout.updates
    cost.seconds.append(seconds / updates)
    stages = added([outcome.seconds for outcome in outcomes])
    cost.by_stage.append({name: spent / updates for name, spent in stages.items()})
    batch = bench.jobs[variant].global_batch * updates
    for kind in outcomes[0].calls:
        calls = sum(outcome.calls[kind] for outcome in outcomes) / batch
        seen = len(cost.seconds)
        cost.calls[kind] = (cost.calls.get(kind, 0.0) * (seen - 1) + calls) / seen


def _counts(job: Job, variant: Variant, step: int) -> dict[str, float]:
    return counts(job, plan_step(job, step), variant.checkpointing(job.recipe))


def _count(bench: Workbench, table: CostTable, variant: Variant) -> None:
    """FLOPs of one iteration, and the mean over many plans put together from the counted parts."""
    job, cost = bench.jobs[variant], table.variants[variant]
    plan = plan_step(job, 0)
    cost.flops = count_flops(lambda: list(bench.rollout(variant, 0))) / job.recipe.rollout.updates
    bench.flat_gradient()
    cost.predicted_flops = total(counts(job, plan, cost.recomputed), table.part_flops)
    drawn = [_counts(job, variant, step) for step in range(PLANS)]
    cost.mean_flops = sum(total(c, table.part_flops) for c in drawn) / PLANS
    cost.bare_flops = sum(total(without_recomputation(c), table.part_flops) for c in drawn) / PLANS
