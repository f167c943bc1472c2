"""The bench as text: Markdown tables, for the terminal and for pages."""

from statistics import median

from sdo_cli.bench.record import full_costs
from sdo_cli.bench.result import BenchResult
from sdo_cli.reports.markdown import markdown


def cost_table(result: BenchResult) -> str:
    """Calls, FLOPs, time and memory; ratios against full backpropagation of each kind that was run."""
    full = full_costs(result.cost)
    kinds = {"none": "full", "blocks": "full, blocks", "calls": "full, calls"}
    against = [kind for kind in kinds if kind in full]
    header = ["rule", "calls", "with graph", "GFLOPs", "bare", *(f"/ {kinds[kind]}" for kind in against)]
    header += ["seconds", "/ bare", *(f"/ {kinds[kind]}" for kind in against), "peak MB", "tensors MB"]
    rows = []
    for variant, cost in result.cost.variants.items():
        memory = result.memory.get(variant)
        rows.append(
            [
                variant.name,
                f"{cost.calls['no_grad']:.1f}",
                f"{cost.calls['grad']:.1f}",
                f"{cost.mean_flops / 1e9:.1f}",
                f"{cost.bare_flops / 1e9:.1f}",
                *(f"{cost.mean_flops / full[kind].mean_flops:.2f}" for kind in against),
                f"{cost.median_seconds:.2f}",
                f"{cost.over_bare:.2f}",
                *(f"{cost.ratio(full[kind]):.2f}" for kind in against),
                f"{memory.peak / 1e6:.0f}" if memory else "",
                f"{memory.tensors / 1e6:.0f}" if memory else "",
            ]
        )
    return markdown(header, rows)


def stage_table(result: BenchResult) -> str:
    """Median seconds by stage."""
    rows = []
    for variant, cost in result.cost.variants.items():
        rows.append([variant.name, ", ".join(f"{name} {seconds:.3f}" for name, seconds in cost.stages.items())])
    return markdown(["rule", "median seconds by stage"], rows)


def nearness_table(result: BenchResult) -> str:
    rows, seen = [], set()
    for variant, found in result.nearness.items():
        if variant.plan_name in seen:
            continue
        seen.add(variant.plan_name)
        spread = f" ± {found.cosine.standard_error:.3f}" if found.cosine.n > 1 else ""
        rows.append(
            [
                variant.plan_name,
                f"{found.cosine.mean:.3f}{spread}",
                f"{found.cosine_of_mean.mean:.3f}",
                "" if found.variance is None else f"{found.variance:.3f}",
                f"{found.error:.2f}",
                str(found.draws),
            ]
        )
    return markdown(["rule", "cosine, one draw", "of the mean", "variance", "error", "draws"], rows)


def worth_table(result: BenchResult) -> str:
    """What a rule's gradient is worth for its cost; needs costs, nearness and full backpropagation beside it."""
    full = full_costs(result.cost)
    against = next((full[kind] for kind in ("calls", "blocks", "none") if kind in full), None)
    if against is None:
        return ""
    rows = []
    for variant, found in result.nearness.items():
        cost = result.cost.variants.get(variant)
        if cost is None or not cost.mean_flops:
            continue
        share = cost.mean_flops / against.mean_flops
        rows.append((found.cosine.mean / share, [variant.name, f"{share:.2f}", f"{found.cosine.mean:.2f}"]))
    rows.sort(key=lambda row: -row[0])
    return markdown(
        ["rule", "cost / full", "cosine", "cosine for the cost"], [[*cells, f"{worth:.2f}"] for worth, cells in rows]
    )


def training_table(result: BenchResult) -> str:
    assert result.training is not None
    names = list(result.training.before)
    reference = next((v for v in result.training.rules if v.name == "sdo"), None)
    rows = []
    for variant, trained in result.training.rules.items():
        steps = [run.steps for run in trained.runs]
        cells = [variant.plan_name, f"{sum(steps) / len(steps):.0f}", f"{median(r.seconds for r in trained.runs):.0f}"]
        for name in names:
            gain = trained.gains[name]
            cells += [f"{gain.difference.mean:+.4f} ± {gain.difference.standard_error:.4f}"]
            cells += [" ".join(f"{value:+.4f}" for value in trained.by_seed[name])]
            if reference is not None:
                paired = result.training.against(variant, reference, name)
                cells += [f"{paired.mean:+.4f} ± {paired.standard_error:.4f}" if variant != reference else ""]
        rows.append(cells)
    header = ["rule", "steps", "seconds"]
    for name in names:
        header += [f"{name} gain", "by seed", *(["less sdo's"] if reference is not None else [])]
    return markdown(header, rows)


def all_tables(result: BenchResult) -> str:
    """What there is, with a line above each table."""
    parts = []
    if result.nearness and (worth := worth_table(result)):
        parts += [
            "What a gradient is worth for its cost, best first. cosine: 1 points where full backpropagation points, 0"
            " tells nothing of it.\nerror (below): distance from the full gradient in its own length, so 0 is equal"
            " and above 1 is further off than no step at all.",
            worth,
        ]
    if any(cost.seconds for cost in result.cost.variants.values()):
        parts += [
            "Cost of one iteration (GFLOPs are means over plans; `bare`: as many bare parts;"
            " `/`: against that kind of full backpropagation, median over rounds):",
            cost_table(result),
            stage_table(result),
        ]
    if result.nearness:
        parts += [
            "Nearness to the full gradient on the same noise and prompts (variance relative to the mean gradient,"
            " error relative to the full one, scale included):",
            nearness_table(result),
        ]
    if result.training:
        pairs = next(iter(result.training.before.values())).numel()
        parts += [
            f"Gain on {pairs} held-out images for {result.training.budget_flops / 1e12:.2f} TFLOPs each"
            " (± over prompts, training seeds averaged):",
            training_table(result),
        ]
    return "\n\n".join(parts)
