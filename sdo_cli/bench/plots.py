"""PNG plots of a bench."""

from pathlib import Path
from typing import Any

from sdo_cli.bench.result import BenchResult
from sdo_cli.bench.variants import Variant
from sdo_cli.files import write_atomic

STAGES = {
    "rollout": "#4c78a8",
    "forward": "#4c78a8",
    "score": "#f2b134",
    "shortcut": "#d1605e",
    "backward": "#d1605e",
}


def draw(part: str, result: BenchResult, folder: Path) -> None:
    """The plot of ``cost``, ``nearness`` or ``training`` as PNG."""
    figure = {"cost": cost_figure, "nearness": nearness_figure, "training": training_figure}[part](result)
    write_atomic(folder / f"{part}.png", lambda temporary: figure.savefig(temporary, dpi=120))


def _new(rows: int, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns + 2.2, 0.34 * rows + 1.4), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _label_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def cost_figure(result: BenchResult) -> Any:
    """Seconds by stage, and FLOPs with the counted floor."""
    rows: list[Variant] = list(result.cost.variants)
    figure, (left, right) = _new(len(rows), 2)
    for y, variant in enumerate(rows):
        cost, start = result.cost.variants[variant], 0.0
        for stage, width in cost.stages.items():
            left.barh(y, width, left=start, color=STAGES[stage])
            start += width
        right.barh(y, cost.mean_flops / 1e9, color="#9db8d9")
        right.plot([cost.bare_flops / 1e9] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1)
    left.set_xlabel("seconds: network without graph or forward, score, backward")
    right.set_xlabel("GFLOPs per iteration; line: no forward run again")
    _label_rows(left, [variant.name for variant in rows])
    right.grid(axis="x", alpha=0.3)
    return figure


def nearness_figure(result: BenchResult) -> Any:
    """Cosine to the full gradient: of one draw, and of the mean over draws."""
    rows = {variant.plan_name: found for variant, found in result.nearness.items()}
    figure, (axes,) = _new(len(rows))
    for y, found in enumerate(rows.values()):
        error = found.cosine.standard_error if found.cosine.n > 1 else 0.0
        axes.barh(y, found.cosine.mean, xerr=error, color="#9db8d9", label="one draw" if y == 0 else None)
        mean, label = found.cosine_of_mean.mean, "mean over draws"
        axes.plot([mean], [y], "o", color="#1f4e8c", markersize=5, label=label if y == 0 else None)
    axes.set_xlabel("cosine to full backpropagation's gradient")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _label_rows(axes, list(rows))
    return figure


def training_figure(result: BenchResult) -> Any:
    """Gain on held-out prompts with standard errors, one panel per reward; small dots are training seeds."""
    assert result.training is not None
    rules = result.training.rules
    names = list(result.training.before)
    figure, panels = _new(len(rules), len(names))
    for axes, name in zip(panels, names, strict=True):
        for y, trained in enumerate(rules.values()):
            gain = trained.gains[name].difference
            axes.errorbar(gain.mean, y, xerr=gain.standard_error, fmt="o", color="#1f4e8c", capsize=3)
            axes.plot(trained.by_seed[name], [y] * len(trained.by_seed[name]), ".", color="#9db8d9")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{name}: gain for equal FLOPs")
        axes.grid(axis="x", alpha=0.3)
    _label_rows(panels[0], [variant.plan_name for variant in rules])
    return figure
