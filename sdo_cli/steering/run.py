"""One job of `sdo optimize`: every group of images steered, and a folder with what came of it."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.errors import Stopped
from sdo_cli.files import alone_in, append_json_line, remove_partial, write_json, write_text
from sdo_cli.parallel.stopping import Stopping
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.plugins import loaded_plugins
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.recipe.steering import LoadedSteering
from sdo_cli.reports.page import write_report
from sdo_cli.runs.kept import Kept, identity_of, status_in
from sdo_cli.scoring.rewards import reading_notes
from sdo_cli.steering.job import Begun, Job, begin, objective_of, prepare, render
from sdo_cli.steering.report import steering_report
from sdo_cli.steering.results import STEPS, step_line, write_images, write_results, write_steps
from sdo_cli.steering.steer import Best, Step, nothing_yet, steer
from sdo_cli.steering.variables_file import whole_lora, whole_path
from sdo_cli.weights.needs import revisions_of

REPORT = "report.html"
# an inversion that loses so much more than the autoencoder alone is worth a word
POOR_INVERSION = 0.03


@dataclass
class Group:
    """Images that are computed together, and what is known of them so far."""

    number: int
    which: range
    begun: Begun
    best: Best
    values: dict[str, Tensor] = field(default_factory=dict)
    first: Step | None = None
    shots: dict[int, Tensor] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def take(self, step: Step) -> None:
        if self.first is None:
            self.first, self.values = step, {key: value.clone() for key, value in step.values.items()}
        for key, value in step.values.items():
            self.values[key] = torch.where(step.better, value, self.values[key])

    def outcome(self, job: Job, folder: Path) -> dict[str, Any]:
        """Its pictures into ``folder``; its state, rows and steps as they are kept."""
        assert self.first is not None
        after = render(self.begun.canvas, self.best.state).cpu()
        write_images(job, self.which, folder, self.begun, self.first.images, after, self.shots)
        rows = [
            {
                "image": number,
                "prompt": job.prompts[number],
                "seed": job.spec.seed + number,
                "before": {key: value[row].item() for key, value in self.first.values.items()},
                "after": {key: value[row].item() for key, value in self.values.items()},
                "best_step": int(self.best.steps[row]),
                "L1": (after[row] - self.first.images[row]).abs().mean().item(),
                "inversion": {key: value[row].item() for key, value in self.begun.errors.items()},
            }
            for row, number in enumerate(self.which)
        ]
        state = {name: value.detach().cpu() for name, value in self.best.state.tensors().items()}
        return {"state": state, "rows": rows, "lines": self.lines}


@dataclass
class Hand:
    """What one process does: its groups one after the other.

    Attributes:
        done: by number under which name groups are kept.
        group: the one in the middle.
    """

    job: Job
    folder: Path
    reporter: Reporter
    done: dict[int, str] = field(default_factory=dict)
    group: Group | None = None

    def steps(self, numbers: list[int]) -> Iterator[bool]:
        """A true value after every step; a group is kept before its last one is told."""
        groups = self.job.groups()
        for number in numbers:
            for last in self._steer(number, groups[number]):
                if last:
                    self.keep(_piece(number))
                yield True

    def keep(self, name: str) -> None:
        """The group in the middle, if there is one, as it is by now."""
        if self.group is not None:
            Kept(self.folder).put(name, self.group.outcome(self.job, self.folder))
            self.done[self.group.number] = name
            self.group = None

    def _steer(self, number: int, which: range) -> Iterator[bool]:
        """After every step whether it is the group's last."""
        spec, reporter = self.job.spec, self.reporter
        name = f"image {which.start}" if len(which) == 1 else f"images {which.start} to {which.stop - 1}"
        reporter.phase(name, spec.steps + 1)
        begun = begin(self.job, which)
        _say_inversion(begun, which, reporter)
        wanted = strip_steps(spec.steps, spec.strip)
        best = nothing_yet(begun.canvas, spec, begun.state)
        group = Group(number, which, begun, best)
        for step in steer(begun.canvas, spec, begun.state, objective_of(self.job, begun, which), best):
            group.take(step)
            self.group = group
            if step.number in wanted:
                group.shots[step.number] = step.images
            group.lines.append(step_line(which, step))
            append_json_line(self.folder / STEPS, group.lines[-1])
            shown = "  ".join(f"{key} {value.mean().item():.4f}" for key, value in step.values.items())
            reporter.advance(1, shown)
            if best.stopped:
                reporter.note(f"{name}: {best.stopped}")
            yield step.number == spec.steps or bool(best.stopped)


def _piece(number: int) -> str:
    return f"group-{number:05d}"


def optimize(
    loaded: LoadedSteering,
    folder: Path,
    reporter: Reporter,
    *,
    stopping: Stopping | None = None,
    world: World = SINGLE,
) -> list[dict[str, Any]]:
    """Steer every image and write the folder; what was reached counts, also when it is stopped.

    Groups of images are dealt out, and those that are finished are kept: the same job goes on in the same folder, with
    any number of processes, and begins the groups anew that it was stopped in.

    Args:
        stopping: asked after every step.
        world: the processes that do it together, in a folder they share.

    Returns:
        One row per image: prompt, values before and after, the step of its best state.

    Raises:
        Stopped: there was a reason to, after everything was written as it was then.
        RecipeFault: the folder holds another job.
    """
    identity = world.share(lambda: identity_in(loaded, folder))
    job, started = prepare(loaded), now()
    # guidance below 1 is what it says here
    notes = drawing_notes(job.family, loaded.prompts, replace(job.settings, guidance_scale=1.0))
    for sentence in [*loaded.prompt_notes(), *notes, *reading_notes(job.rewards, loaded.prompts)]:
        reporter.note(sentence)

    def record(status: str) -> None:
        if world.is_main:
            _record(loaded, folder, status, started, identity, world)

    with ExitStack() as stack:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(folder))
        record("running")
        # when another process fails there is no way back to here
        world.peers.before_the_end = lambda: record("failed")
        status = "failed"
        try:
            done, stop = _steer_all(job, loaded, folder, reporter, stopping or Stopping(world=world), world)
            rows = world.share(lambda: write_results(job, loaded, folder, done, reporter))
            status = "interrupted" if stop else "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            world.peers.before_the_end = None
            record(status)
        if world.is_main and rows:
            write_report(steering_report(folder), folder / REPORT)
        if stop:
            reporter.note(f"{folder}/ holds {len(rows)} of {len(job.prompts)} images as far as they came")
            raise stop
        if world.is_main:
            Kept(folder).clear()
    return rows


def identity_in(loaded: LoadedSteering, folder: Path) -> dict[str, Any]:
    """What this job is; raises RecipeFault where ``folder`` holds another."""
    found = identity(loaded)
    status_in(folder, found)
    return found


def is_finished(loaded: LoadedSteering, folder: Path) -> bool:
    """Whether ``folder`` holds all of this job, its report included; raises RecipeFault where it holds another."""
    return status_in(folder, identity(loaded)) == "finished" and (folder / REPORT).exists()


def identity(loaded: LoadedSteering) -> dict[str, Any]:
    """What a job of steering is, by dotted key: everything that changes what comes of it."""
    spec = loaded.spec
    tree = {key: value for key, value in asdict(spec).items() if key not in ("prompts", "description", "output_dir")}
    pictures = {f"images.{number}": path for number, path in enumerate(spec.images)}
    pictures |= {item.name: item.value for item in spec.objectives if item.kind in ("style", "image")}
    scored = [item.reward for item in spec.objectives if item.reward is not None]
    files = {**pictures, "lora": spec.lora}
    return identity_of(tree, {"prompts": loaded.prompts}, [*scored, *spec.measures], files)


def _steer_all(
    job: Job, loaded: LoadedSteering, folder: Path, reporter: Reporter, stopping: Stopping, world: World
) -> tuple[dict[int, str], Stopped | None]:
    """By number under which name groups are kept, and why it was stopped: then also those in the middle."""
    numbers = range(len(job.groups()))

    def begin_folder() -> dict[int, str]:
        remove_partial(folder)
        _write_recipe(loaded, folder)
        found = {number: outcome for number in numbers if (outcome := Kept(folder).get(_piece(number))) is not None}
        write_steps(folder, list(found.values()))
        return {number: _piece(number) for number in found}

    done = world.share(begin_folder)
    if done:
        reporter.note(f"going on: {len(done)} of {len(numbers)} groups of images are finished")
    todo = [number for number in numbers if number not in done]
    hand, stop = Hand(job, folder, reporter), None
    steps = hand.steps([number for place, number in enumerate(todo) if world.mine(place)])
    try:
        # who has finished its groups waits: a safe point is everybody's
        while world.largest(int(next(steps, False))):
            stopping.check()
    except Stopped as reason:
        stop = reason
        # under a name that nothing goes on from
        hand.keep(f"reached-{world.rank}")
    except BaseException:
        # whatever ended it, finished groups are not lost
        if world.size == 1:
            write_results(job, loaded, folder, done | hand.done, reporter)
        raise
    for theirs in world.gather(hand.done):
        done = done | theirs
    return done, stop


def _write_recipe(loaded: LoadedSteering, folder: Path) -> None:
    tree = loaded.resolved() | {"prompts": {"lines": loaded.prompts}}
    tree |= {"model": whole_path(tree["model"]), "vae": whole_path(tree["vae"]), "lora": whole_lora(tree["lora"])}
    tree["images"] = [whole_path(name) for name in tree["images"]]
    for item in tree["objectives"]:
        kind, colon, place = item["name"].partition(":")
        item["name"] = f"{kind}:{whole_path(place)}" if colon and kind in ("style", "image") else item["name"]
    write_text(folder / "resolved.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))


def _record(
    loaded: LoadedSteering, folder: Path, status: str, started: str, identity: dict[str, Any], world: World
) -> None:
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
            "processes": world.size,
            "started": started,
            "written": now(),
            "identity": identity,
        },
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
