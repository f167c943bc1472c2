"""Figures of plans and controls: JSON, CSV, Markdown, plot."""

import csv
import io
from pathlib import Path
from typing import Any

from sdo_cli.estimate.units import Flops, UnitFlops
from sdo_cli.files import write_atomic, write_text
from sdo_cli.prune.measure import FULL, SSIM, ArmMeasures, median
from sdo_cli.reports.markdown import markdown

TABLE, PLOT, ROWS = "table.md", "measures.png", "measures.csv"


def record(found: list[ArmMeasures], flops: UnitFlops) -> dict[str, Any]:
    """What ``measures.json`` holds.

    Args:
        flops: of the network's units, one branch of one call.
    """
    return {
        "prompts": len(found[0].values[SSIM]),
        "call": _unit(flops.call, flops) | {"published_gmacs": flops.call.published_macs / 1e9},
        "units": {name: _unit(unit, flops) for name, unit in flops.units.items()},
        "arms": [_arm(item, found[0]) for item in found],
    }


def _unit(unit: Flops, flops: UnitFlops) -> dict[str, float]:
    return {"gflops": unit.all / 1e9, "attention_gflops": unit.attention / 1e9, "share": unit.all / flops.call.all}


def _arm(item: ArmMeasures, full: ArmMeasures) -> dict[str, Any]:
    quality: dict[str, Any] = {"prompts": len(item.values[SSIM])}
    for name, values in item.values.items():
        quality[name] = {"mean": float(values.mean())}
        if name != SSIM:
            gap = item.difference(full, name)
            quality[name] |= {"full": float(full.values[name].mean()), "difference": [gap.mean, gap.low, gap.high]}
    cost = {"calls": item.calls, "kept": item.kept, "image_gflops": item.flops / 1e9, "speed_up": item.speed_up}
    return {"name": item.arm.name, "ratio": item.arm.ratio, "cost": cost, "quality": quality}


def rows_of(found: list[ArmMeasures]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, most computation first, the full sampler on top."""
    rewards = [name for name in found[0].values if name != SSIM]
    header = ["sampler", "calls", "compute", "faster", "SSIM"]
    header += [column for name in rewards for column in (name, "difference [95 %]")]
    rows = []
    for item in [found[0], *sorted(found[1:], key=lambda item: (item.arm.ratio, -item.kept))]:
        cells = [item.arm.name, str(item.calls), f"{item.kept:.1%}", f"{median(item.speed_up):.2f}×"]
        cells.append(f"{item.values[SSIM].mean():.3f}")
        for name in rewards:
            gap = "" if item.arm.name == FULL else str(item.difference(found[0], name))
            cells += [f"{item.values[name].mean():.4f}", gap]
        rows.append(cells)
    return header, rows


def table(found: list[ArmMeasures]) -> str:
    return markdown(*rows_of(found))


def save_figures(found: list[ArmMeasures], folder: Path) -> None:
    header, rows = rows_of(found)
    write_text(folder / TABLE, markdown(header, rows) + "\n")
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    write_text(folder / ROWS, stream.getvalue())
    write_atomic(folder / PLOT, lambda temporary: figure(found).savefig(temporary, dpi=120))


def figure(found: list[ArmMeasures]) -> Any:
    """Every measure against the share of computation, a line per kind of sampler."""
    from matplotlib.figure import Figure

    names = list(found[0].values)
    drawn = Figure(figsize=(5.4 * len(names), 4.2), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    kinds = dict.fromkeys(_kind(item) for item in found[1:])
    for axes, name in zip(panels, names, strict=True):
        axes.axhline(found[0].values[name].mean(), color="black", linewidth=0.8, linestyle=":", label=FULL)
        for kind in kinds:
            items = sorted((item for item in found[1:] if _kind(item) == kind), key=lambda item: item.kept)
            axes.plot([item.kept for item in items], [item.values[name].mean() for item in items], "o-", label=kind)
        axes.set_xlabel("share of the full sampler's computation")
        axes.set_ylabel("similarity to the full sampler (SSIM)" if name == SSIM else name)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, frameon=False)
    return drawn


def _kind(item: ArmMeasures) -> str:
    """The arm's name without its number."""
    return item.arm.name.rpartition(" ")[0] or item.arm.name.rpartition("-")[0]
