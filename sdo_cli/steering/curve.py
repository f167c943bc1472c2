"""The objective over the steps, of all images of a folder."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdo_cli.files import write_atomic


def curves_of(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """By objective ``[steps + 1, images]``; NaN after the step at which an image's group ended."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps, images = max(row["step"] for row in lines) + 1, max(row["images"][1] for row in lines)
    found = {name: np.full((steps, images), np.nan) for name in lines[0]["values"]}
    for row in lines:
        for name, values in row["values"].items():
            found[name][row["step"], slice(*row["images"])] = [np.nan if v is None else v for v in values]
    return found


def whole_steps(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``[steps, images]`` as far as every image has a value, without images that have none from the start."""
    some = values[:, ~np.isnan(values[0])]
    return some[~np.isnan(some).any(axis=1)]


def curve_png(lines: Path, path: Path) -> None:
    """One panel per objective: every image in grey, their mean over it."""
    from matplotlib.figure import Figure

    curves = curves_of(lines)
    figure = Figure(figsize=(6, 2.6 * len(curves)), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True):
        axes.plot(values, color="0.8", linewidth=0.8)
        whole = whole_steps(values)
        axes.plot(whole.mean(axis=1), color="tab:blue")
        axes.set(xlabel="step", ylabel=name)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110))
