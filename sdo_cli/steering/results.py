"""What a job of `sdo optimize` leaves in its folder: images, strips, every step, variables, scores, grid and curve."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdo_cli.drawing.pictures import read_image, save_grid, save_image
from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import without_nan, write_json, write_text
from sdo_cli.progress import Reporter
from sdo_cli.recipe.steering import LoadedSteering
from sdo_cli.runs.kept import Kept
from sdo_cli.scoring.rewards import score_images
from sdo_cli.steering.curve import curve_png
from sdo_cli.steering.job import Begun, Job
from sdo_cli.steering.render import save_images
from sdo_cli.steering.steer import Step
from sdo_cli.steering.variables_file import save_variables

STEPS = "objective.jsonl"


def step_line(which: range, step: Step) -> dict[str, Any]:
    row = {
        "images": [which.start, which.stop],
        "step": step.number,
        "losses": step.losses.tolist(),
        "values": {key: value.tolist() for key, value in step.values.items()},
        "calls": step.calls,
        "seconds": step.seconds,
    }
    return dict(without_nan(row))


def write_steps(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    """Every group's steps, group by group; while it runs they come as they come."""
    lines = [line for outcome in outcomes for line in outcome["lines"]]
    write_text(folder / STEPS, "".join(json.dumps(line) + "\n" for line in lines))


def write_images(
    job: Job, which: range, folder: Path, begun: Begun, before: Tensor, after: Tensor, shots: dict[int, Tensor]
) -> None:
    save_images(job, after, which, folder)
    save_images(job, before, which, folder / "before", steered=bool(job.spec.images))
    for row, number in enumerate(which):
        if begun.sources is not None:
            save_image(begun.sources[row], folder / "pictures" / f"{number:05d}.png")
        if shots:
            row_of = torch.stack([images[row] for images in shots.values()])
            heads = [f"step {step}" for step in shots]
            save_grid([row_of], [""], folder / "strips" / f"{number:05d}.png", captions=heads)


def write_results(
    job: Job, loaded: LoadedSteering, folder: Path, done: dict[int, str], reporter: Reporter
) -> list[dict[str, Any]]:
    """Variables, measures of the files as they are, grid and curve, of all groups up to the first that is missing."""
    names = itertools.takewhile(bool, (done.get(number, "") for number in range(len(job.groups()))))
    whole = [kept(folder, name) for name in names]
    rows: list[dict[str, Any]] = [row for outcome in whole for row in outcome["rows"]]
    if not rows:
        return rows
    prompts = job.prompts[: len(rows)]
    write_steps(folder, whole)
    states = [outcome["state"] for outcome in whole]
    save_variables(folder / "variables.safetensors", job.spec, prompts, loaded.prompts, states)
    write_json(folder / "results.json", without_nan({"images": rows}))
    ends = {
        when: torch.stack([read_image(place / f"{number:05d}.png") for number in range(len(rows))])
        for when, place in (("before", folder / "before"), ("after", folder))
    }
    for name, reward in job.measures.items():
        reporter.phase(f"measuring {name}", 1)
        for when, images in ends.items():
            scores = score_images(reward, images.to(job.family.device), prompts)
            for row, score in zip(rows, scores.tolist(), strict=True):
                row[when][name] = score
        reporter.advance(1)
    write_json(folder / "results.json", without_nan({"images": rows}))
    columns = slice(0, 8)
    sheet = [ends["before"][columns], ends["after"][columns]]
    save_grid(sheet, ["before", "after"], folder / "grid.png", captions=prompts[columns])
    curve_png(folder / STEPS, folder / "curve.png")
    return rows


def kept(folder: Path, name: str) -> dict[str, Any]:
    found = Kept(folder).get(name)
    if found is None:
        raise EnvironmentFault(
            f"{folder}/: {name} is not to be seen whole", remedy="the folder must be on a disk that all processes share"
        )
    return dict(found)
