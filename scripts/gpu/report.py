"""What gpu/check.py says: figures as JSON, targets met or not, a short table."""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

from gpu.arms import REFERENCE
from gpu.count import Counted, flops_of
from gpu.measure import Changed, Measured

from sdo_cli.bench.cost import Cost
from sdo_cli.bench.memory import Memory
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.work import Work
from sdo_cli.reports.markdown import markdown

SDO, PRUNED, ONE_BY_ONE = "SDO", "SDO, pruned rollouts", "SDO, scored and sent back one by one"
Record = dict[str, Any]


def speed_record(speed: Speed) -> Record:
    """Rates by product and precision, as JSON has them."""
    rates = {f"{product}, {precision}": curve for (product, precision), curve in speed.rates.items()}
    return {**asdict(speed), "rates": rates, "products": speed.products}


def cell_record(measured: Measured, counted: Counted | None, speed: Speed) -> Record:
    """A cell's raw rounds with ratios and, where it was counted, bounds and the estimator's seconds beside them.

    Args:
        speed: measured on this device.
    """
    cell, against = measured.cell, measured.arms.get(REFERENCE)
    arms = {
        arm: arm_record(cost, memory, against[0] if against else None)
        | (bounds_record(cost, counted[arm], speed) if counted else {})
        for arm, (cost, memory) in measured.arms.items()
    }
    settings = {key: getattr(cell, key) for key in ("kind", "pixels", "batch", "steps", "computed", "precision")}
    return {"name": cell.name, **settings, "arms": arms, "left_out": measured.left_out}


def arm_record(cost: Cost, memory: Memory, full: Cost | None) -> Record:
    """What was measured of one arm; seconds and bytes are of one iteration."""
    return {
        "seconds": cost.seconds,
        "median_seconds": cost.median_seconds,
        "against_full": None if full is None else cost.ratio(full),
        "seconds_by_stage": cost.by_stage,
        "median_by_stage": cost.stages,
        "calls": cost.calls,
        # of a CPU the process's resident memory is noise at tiny size
        "peak_bytes": memory.tensors,
    }


def bounds_record(cost: Cost, counted: dict[str, Work], speed: Speed) -> Record:
    """A bound is what the products alone would take, each in its precision, at the speed of large matrices.

    Stages of one-graph rules are counted as one.
    """
    bounds, estimated = ({name: of(work) for name, work in counted.items()} for of in (_bound(speed), _seconds(speed)))
    return {
        "flops": flops_of(counted),
        "bound_seconds": bounds,
        "fraction_of_bound": sum(bounds.values()) / cost.median_seconds,
        "fraction_by_stage": {
            name: bounds[name] / seconds for name, seconds in cost.stages.items() if name in flops_of(counted)
        },
        "estimated_seconds": estimated,
        "estimated_over_measured": sum(estimated.values()) / cost.median_seconds,
    }


def _bound(speed: Speed) -> Callable[[Work], float]:
    return lambda work: work.bound(speed)


def _seconds(speed: Speed) -> Callable[[Work], float]:
    return lambda work: work.seconds(speed)


def changed_record(found: Changed) -> Record:
    pairs = zip(found.on.seconds, found.off.seconds, strict=True)
    return {
        "arm": found.arm,
        "word": found.word,
        "first_seconds": found.first,
        "seconds_off": found.off.seconds,
        "seconds_on": found.on.seconds,
        "on_against_off": median(on / off for on, off in pairs),
        "stages_off": found.off.stages,
        "stages_on": found.on.stages,
        "peak_bytes_on": found.peak_on.tensors if found.peak_on else None,
    }


# targets


def targets_of(cell: Record | None, compiled: Record | None) -> list[Record]:
    """The project's targets, of the first cell; ``met`` is None where there is nothing to judge by."""
    arms = cell["arms"] if cell else {}
    sdo, full, pruned, single = (arms.get(name) for name in (SDO, REFERENCE, PRUNED, ONE_BY_ONE))
    return [
        target("SDO's time over checkpointed full's", "at most", 0.40, _get(sdo, "against_full")),
        target("SDO's peak memory above weights over checkpointed full's", "at most", 1.0, _peaks(sdo, full)),
        target("the same, scored and sent back one by one", "at most", 1.0, _peaks(single, full)),
        target("stage 1's fraction of its bound", "at least", 0.70, _fraction(sdo)),
        target(
            "SDO's time with pruned rollouts over checkpointed full's", "at most", 0.15, _get(pruned, "against_full")
        ),
        # no figure was set: it has to be worth it
        target("SDO's time compiled over not compiled", "at most", 1.0, _get(compiled, "on_against_off")),
    ]


def target(text: str, way: str, limit: float, value: float | None) -> Record:
    met = None if value is None else value <= limit if way == "at most" else value >= limit
    return {"target": text, "way": way, "limit": limit, "value": value, "met": met}


def _get(record: Record | None, key: str) -> float | None:
    return None if record is None else record.get(key)


def _peaks(sdo: Record | None, full: Record | None) -> float | None:
    return sdo["peak_bytes"] / full["peak_bytes"] if sdo and full and full["peak_bytes"] else None


def _fraction(sdo: Record | None) -> float | None:
    return sdo["fraction_by_stage"]["rollout"] if sdo and "fraction_by_stage" in sdo else None


# text


def report(record: Record) -> str:
    """Short: a table per cell, the targets, what was left out."""
    parts = [f"{_machine(record)}, {record['date']}"]
    if record["tests"] is not None:
        parts.append(f"GPU tests: {record['tests']['summary']}")
    parts += [cell_table(cell) for cell in record["cells"]]
    parts += [changed_line(record[name]) for name in ("compile", "channels_last") if record.get(name)]
    parts += [f"left out: {text}" for text in record["left_out"]]
    return "\n\n".join([*parts, target_table(record["targets"])])


def _machine(record: Record) -> str:
    speed = record["speed"]
    products = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in speed["products"].items())
    return f"{speed['name']}: TFLOP/s of matrix products {products}"


def cell_table(cell: Record) -> str:
    header = [
        cell["name"],
        "seconds",
        "/ full",
        "peak GB",
        "TFLOP",
        "of bound",
        "estimated",
        "stages: seconds (of bound)",
    ]
    rows = [
        [
            arm,
            f"{found['median_seconds']:.3f}",
            "" if found["against_full"] is None else f"{found['against_full']:.3f}",
            f"{found['peak_bytes'] / 1e9:.3g}",
            *_counted(found),
            ", ".join(_stage(found, name) for name in found["median_by_stage"]),
        ]
        for arm, found in cell["arms"].items()
    ]
    rounds = max((len(found["seconds"]) for found in cell["arms"].values()), default=0)
    missing = "".join(f"; {arm}: {why}" for arm, why in cell["left_out"].items())
    return f"{markdown(header, rows)}\n\nmedians of {rounds} rounds; peak above weights{missing}"


def _counted(found: Record) -> list[str]:
    if "flops" not in found:
        return ["", "", ""]
    tera, share = sum(found["flops"].values()) / 1e12, found["estimated_over_measured"]
    return [f"{tera:.3g}", f"{found['fraction_of_bound']:.0%}", f"{share:.2f} of it"]


def _stage(found: Record, name: str) -> str:
    fraction = found.get("fraction_by_stage", {}).get(name)
    return f"{name} {found['median_by_stage'][name]:.3f}" + (f" ({fraction:.0%})" if fraction else "")


def changed_line(found: Record) -> str:
    return (
        f"{found['arm']} with {found['word']}: {median(found['seconds_on']):.3f} s instead of"
        f" {median(found['seconds_off']):.3f}, {found['on_against_off']:.2f} of it; the first iteration took"
        f" {found['first_seconds']:.0f} s"
    )


def target_table(targets: list[Record]) -> str:
    said = {True: "met", False: "NOT met", None: "not measured"}
    rows = [
        [item["target"], f"{item['way']} {item['limit']:.2f}", _figure(item["value"]), said[item["met"]]]
        for item in targets
    ]
    return markdown(["target", "", "measured", ""], rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
