"""One job of `sdo optimize`: every group of images steered, and a folder with what came of it."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.pictures import read_image, save_grid, save_image
from sdo_cli.errors import Interrupted
from sdo_cli.files import alone_in, append_json_line, without_nan, write_json, write_text
from sdo_cli.plugins import loaded_plugins
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.recipe.steering import LoadedSteering
from sdo_cli.reports.page import write_report
from sdo_cli.scoring.rewards import reading_notes, score_images
from sdo_cli.steering.curve import curve_png
from sdo_cli.steering.job import Begun, Job, begin, objective_of, prepare, render
from sdo_cli.steering.render import save_images
from sdo_cli.steering.report import steering_report
from sdo_cli.steering.steer import Best, Step, nothing_yet, steer
from sdo_cli.steering.variables import State
from sdo_cli.steering.variables_file import save_variables, whole_lora, whole_path
from sdo_cli.weights.needs import revisions_of

# an inversion that loses so much more than the autoencoder alone is worth a word
POOR_INVERSION = 0.03


@dataclass
class Done:
    """What is known of the images so far, in their order."""

    states: list[State] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def count(self) -> int:
        return len(self.rows)


def optimize(loaded: LoadedSteering, folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Steer every image and write the folder; what was reached counts, also when it is interrupted.

    Returns:
        One row per image: prompt, values before and after, the step of its best state.

    Raises:
        Interrupted: by Ctrl-C, after everything was written as it was then.
    """
    job, started = prepare(loaded), now()
    # guidance below 1 is what it says here
    notes = drawing_notes(job.family, loaded.prompts, replace(job.settings, guidance_scale=1.0))
    for sentence in [*loaded.prompt_notes(), *notes, *reading_notes(job.rewards, loaded.prompts)]:
        reporter.note(sentence)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _begin_folder(loaded, folder, started)
        done, status = Done(), "failed"
        try:
            try:
                for which in job.groups():
                    _steer_group(job, which, folder, done, reporter)
                    if done.interrupted:
                        break
            except KeyboardInterrupt:
                # while images were drawn or written: what was done before them counts
                done.interrupted = True
            finally:
                # whatever ended it, finished groups are not lost
                if done.count:
                    _write_results(job, loaded, folder, done, reporter)
            status = "interrupted" if done.interrupted else "finished"
        finally:
            _record(loaded, folder, status, started)
        if done.count:
            write_report(steering_report(folder), folder / "report.html")
    if done.interrupted:
        raise Interrupted(
            f"interrupted; {folder}/ holds {done.count} of {len(job.prompts)} images as far as they came",
            remedy="start it again, into another folder, for the rest",
        )
    return done.rows


def _begin_folder(loaded: LoadedSteering, folder: Path, started: str) -> None:
    tree = loaded.resolved() | {"prompts": {"lines": loaded.prompts}}
    tree |= {"model": whole_path(tree["model"]), "vae": whole_path(tree["vae"]), "lora": whole_lora(tree["lora"])}
    tree["images"] = [whole_path(name) for name in tree["images"]]
    for item in tree["objectives"]:
        kind, colon, place = item["name"].partition(":")
        item["name"] = f"{kind}:{whole_path(place)}" if colon and kind in ("style", "image") else item["name"]
    write_text(folder / "resolved.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))
    _record(loaded, folder, "running", started)


def _record(loaded: LoadedSteering, folder: Path, status: str, started: str) -> None:
    write_json(
        folder / "manifest.json",
        {
            "status": status,
            "command": command(),
            "recipe": loaded.name,
            "weights": revisions_of(loaded.spec.as_recipe()),
            "versions": versions(),
            "plugins": [asdict(plugin) for plugin in loaded_plugins()],
            "machine": machine(),
            "started": started,
            "written": now(),
        },
    )


def _steer_group(job: Job, which: range, folder: Path, done: Done, reporter: Reporter) -> None:
    """Steer the images ``which`` and put what they became into ``done``; Ctrl-C ends it where it is."""
    spec = job.spec
    name = f"image {which.start}" if len(which) == 1 else f"images {which.start} to {which.stop - 1}"
    reporter.phase(name, spec.steps + 1)
    shots: dict[int, Tensor] = {}
    first: Step | None = None
    best: Best | None = None
    values: dict[str, Tensor] = {}
    try:
        begun = begin(job, which)
        _say_inversion(begun, which, reporter)
        wanted = strip_steps(spec.steps, spec.strip)
        best = nothing_yet(begun.canvas, spec, begun.state)
        for step in steer(begun.canvas, spec, begun.state, objective_of(job, begun, which), best):
            if first is None:
                first, values = step, {key: value.clone() for key, value in step.values.items()}
            for key, value in step.values.items():
                values[key] = torch.where(step.better, value, values[key])
            if step.number in wanted:
                shots[step.number] = step.images
            _log(folder, which, step)
            shown = "  ".join(f"{key} {value.mean().item():.4f}" for key, value in step.values.items())
            reporter.advance(1, shown)
        if best.stopped:
            reporter.note(f"{name}: {best.stopped}")
    except KeyboardInterrupt:
        done.interrupted = True
        if first is None or best is None:
            return
    assert first is not None and best is not None
    after = render(begun.canvas, best.state).cpu()
    _write_images(job, which, folder, begun, first.images, after, shots)
    done.states.append(best.state)
    for row, number in enumerate(which):
        done.rows.append(
            {
                "image": number,
                "prompt": job.prompts[number],
                "seed": job.spec.seed + number,
                "before": {key: value[row].item() for key, value in first.values.items()},
                "after": {key: value[row].item() for key, value in values.items()},
                "best_step": int(best.steps[row]),
                "L1": (after[row] - first.images[row]).abs().mean().item(),
                "inversion": {key: value[row].item() for key, value in begun.errors.items()},
            }
        )


def _say_inversion(begun: Begun, which: range, reporter: Reporter) -> None:
    for row, number in enumerate(which) if begun.errors else ():
        plain, whole = (begun.errors[key][row].item() for key in ("autoencoder", "inversion"))
        text = f"picture {number}: drawn again from its inversion it is off by {whole:.4f} (root mean square of pixels)"
        text += f", {plain:.4f} of it the autoencoder's"
        if not whole <= plain + POOR_INVERSION:
            text += "; nearer with a later start, guidance_scale=1, or more inversion_iterations"
        reporter.note(text)


def strip_steps(steps: int, count: int) -> list[int]:
    """Steps whose images are kept: dense at first, where most happens."""
    if count < 2:
        return [steps] * count
    return sorted({math.ceil(steps * (i / (count - 1)) ** 2) for i in range(count)})


def _log(folder: Path, which: range, step: Step) -> None:
    row = {
        "images": [which.start, which.stop],
        "step": step.number,
        "losses": step.losses.tolist(),
        "values": {key: value.tolist() for key, value in step.values.items()},
        "calls": step.calls,
        "seconds": step.seconds,
    }
    append_json_line(folder / "objective.jsonl", without_nan(row))


def _write_images(
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


def _write_results(job: Job, loaded: LoadedSteering, folder: Path, done: Done, reporter: Reporter) -> None:
    """Variables, measures of the files as they are, grid and curve."""
    prompts = job.prompts[: done.count]
    save_variables(folder / "variables.safetensors", job.spec, prompts, loaded.prompts, done.states)
    write_json(folder / "results.json", without_nan({"images": done.rows}))
    ends = {
        when: torch.stack([read_image(place / f"{number:05d}.png") for number in range(done.count)])
        for when, place in (("before", folder / "before"), ("after", folder))
    }
    for name, reward in job.measures.items():
        reporter.phase(f"measuring {name}", 1)
        for when, images in ends.items():
            scores = score_images(reward, images.to(job.family.device), prompts)
            for row, score in zip(done.rows, scores.tolist(), strict=True):
                row[when][name] = score
        reporter.advance(1)
    write_json(folder / "results.json", without_nan({"images": done.rows}))
    columns = slice(0, 8)
    rows = [ends["before"][columns], ends["after"][columns]]
    save_grid(rows, ["before", "after"], folder / "grid.png", captions=prompts[columns])
    curve_png(folder / "objective.jsonl", folder / "curve.png")
