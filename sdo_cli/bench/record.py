"""Measurements as plain data for ``bench.json``. Seconds, bytes and FLOPs are raw, ratios are beside them."""

from dataclasses import asdict
from typing import Any

from sdo_cli.bench.cost import Cost, CostTable
from sdo_cli.bench.memory import Memory
from sdo_cli.bench.nearness import Nearness
from sdo_cli.bench.training import Comparison
from sdo_cli.bench.variants import Variant
from sdo_cli.scoring.statistics import Estimate


def number(estimate: Estimate) -> dict[str, float | int | None]:
    # JSON knows no NaN: a single value has no standard error
    return {
        "mean": estimate.mean,
        "standard_error": estimate.standard_error if estimate.n > 1 else None,
        "n": estimate.n,
    }


def full_costs(table: CostTable) -> dict[str, Cost]:
    """Full backpropagation by what it recomputes, with the recipe's own rollouts: what every ratio is against."""
    full = [(variant, cost) for variant, cost in table.variants.items() if variant.rule == "full"]
    return {cost.recomputed: cost for variant, cost in full if not variant.own_rollouts}


def cost_record(table: CostTable, memory: dict[Variant, Memory]) -> dict[str, Any]:
    full = full_costs(table)
    rules = {}
    for variant, cost in table.variants.items():
        row: dict[str, Any] = {
            "flops": cost.flops,
            "predicted_flops": cost.predicted_flops,
            "mean_flops": cost.mean_flops,
            "bare_flops": cost.bare_flops,
            "flops_against_full": {kind: cost.mean_flops / other.mean_flops for kind, other in full.items()},
        }
        if cost.seconds:
            row |= {
                "calls": cost.calls,
                "seconds": cost.seconds,
                "median_seconds": cost.median_seconds,
                "seconds_by_stage": cost.by_stage,
                "bare_seconds": cost.bare_seconds,
                "seconds_over_bare": cost.over_bare,
                "seconds_against_full": {kind: cost.ratio(other) for kind, other in full.items()},
            }
        if variant in memory:
            row["memory"] = asdict(memory[variant])
        rules[variant.name] = row
    return {"rules": rules, "part_flops": table.part_flops, "part_seconds": table.part_seconds}


def nearness_record(nearness: dict[Variant, Nearness]) -> dict[str, Any]:
    return {
        variant.plan_name: {
            "cosine": number(found.cosine),
            "cosine_of_mean": number(found.cosine_of_mean),
            "variance": found.variance,
            "error": found.error,
            "draws": found.draws,
        }
        for variant, found in nearness.items()
    }


def training_scores(comparison: Comparison) -> dict[str, Any]:
    """Every held-out score, ``[training seed][prompt][image]``, so that any two rules can be paired."""
    return {
        "before": {name: scores.tolist() for name, scores in comparison.before.items()},
        "after": {
            variant.plan_name: {name: [run.scores[name].tolist() for run in trained.runs] for name in comparison.before}
            for variant, trained in comparison.rules.items()
        },
    }


def training_record(comparison: Comparison) -> dict[str, Any]:
    rules = {}
    for variant, trained in comparison.rules.items():
        rules[variant.plan_name] = {
            "steps": [run.steps for run in trained.runs],
            "flops": [run.flops for run in trained.runs],
            "seconds": [run.seconds for run in trained.runs],
            "gains": {
                name: {
                    "before": gain.before.mean,
                    "after": gain.after.mean,
                    "difference": number(gain.difference),
                    "by_seed": trained.by_seed[name],
                }
                for name, gain in trained.gains.items()
            },
        }
    return {"budget_flops": comparison.budget_flops, "rules": rules}
