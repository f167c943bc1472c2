"""Keep-scores of DiP-GO's search: trained, put away, or of an earlier search."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import append_json_line, write_atomic, write_text
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.prune.job import PruneJob
from sdo_cli.prune.search import Update, search
from sdo_cli.prune.setting import Setting
from sdo_cli.runs.kept import Kept
from sdo_cli.runs.read import read_lines

SCORES, SEARCH = "scores.safetensors", "search.jsonl"
# the search is kept so often that little is lost
SAVE_EVERY = 25


def keep_scores(
    setting: Setting, job: PruneJob, folder: Path, reporter: Reporter, world: World = SINGLE
) -> tuple[Tensor, dict[str, Any]]:
    """``[calls, units]``, trained or of an earlier search, and what they were made with."""
    if job.scores is not None:
        scores, made_by = load_scores(job.scores, setting, job.measure.prompts)
        if world.is_main:
            save_scores(folder / SCORES, scores, setting, made_by)
        return scores, made_by
    made_by = {
        "search": asdict(job.search),
        "prompts": len(job.prompts),
        "seed": job.seed,
        "guidance_scale": setting.settings.guidance_scale,
    }
    kept, lines = Kept(folder), folder / SEARCH
    so_far = world.share(lambda: kept.get("search"))
    number, reached, state = so_far or (0, None, None)
    # what came after it is done again
    before = world.share(lambda: [line for line in read_lines(lines) if line["update"] <= number])
    if world.is_main:
        write_text(lines, "".join(json.dumps(line) + "\n" for line in before))
    reporter.phase("search", job.search.updates)
    if number:
        reporter.note(f"going on after update {number} of {job.search.updates}")
        reporter.advance(number)
    begun, done = time.perf_counter() - (before[-1]["seconds"] if before else 0.0), None

    def save(update: Update) -> None:
        if world.is_main:
            kept.put("search", (update.number, update.scores, update.state))
            save_scores(folder / SCORES, update.scores, setting, made_by | {"updates_done": update.number})

    try:
        for done in search(setting, job.search, world=world, state=state):
            if world.is_main:
                line = {"update": done.number, "distance": done.distance, "kept": done.kept}
                append_json_line(lines, line | {"seconds": time.perf_counter() - begun})
            if done.number % SAVE_EVERY == 0:
                save(done)
            reporter.advance(1, f"distance {done.distance:.4f}  kept {done.kept:.0%}")
    finally:
        if done is not None:
            save(done)
    if done is not None:
        return done.scores, made_by
    assert reached is not None
    return reached, made_by


def save_scores(path: Path, scores: Tensor, setting: Setting, made_by: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    about: dict[str, Any] = {
        "made_for": asdict(setting.made_for),
        "grain": setting.grain,
        "units": setting.wiring.units,
    }
    about["searched_on"] = sorted(map(short, setting.prompts))
    told = {"about": json.dumps(about), "made_by": json.dumps(made_by)}
    write_atomic(path, lambda temporary: save_file({"scores": scores.contiguous()}, temporary, metadata=told))


def scores_file(folder: Path) -> Path:
    return folder / SCORES if folder.is_dir() else folder


def load_scores(folder: Path, setting: Setting, measured_on: Sequence[str] = ()) -> tuple[Tensor, dict[str, Any]]:
    """Those of an earlier search.

    Raises:
        EnvironmentFault: none there, of another model, solver or grain, or searched on what is to be measured on.
    """
    from safetensors import SafetensorError, safe_open

    path = scores_file(folder)
    if not path.is_file():
        raise EnvironmentFault(
            f"{folder} holds no {SCORES}", remedy="give the folder of an `sdo prune --method dip-go`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            told, scores = file.metadata() or {}, file.get_tensor("scores")
        about, made_by = json.loads(told["about"]), json.loads(told["made_by"])
    except (SafetensorError, KeyError, ValueError, OSError) as fault:
        raise EnvironmentFault(f"{path} is damaged: {fault}", remedy="search again") from fault
    mine = {"made_for": asdict(setting.made_for), "grain": setting.grain, "units": setting.wiring.units}
    wanted = json.loads(json.dumps(mine))
    wrong = [key for key in ("grain", "units") if about.get(key) != wanted[key]]
    wrong += [key for key in wanted["made_for"] if about["made_for"].get(key) != wanted["made_for"][key]]
    if wrong:
        raise EnvironmentFault(
            f"the scores in {path} are of another {', '.join(wrong)}",
            remedy="give the options of that search, or search again",
        )
    if both := set(about.get("searched_on", ())).intersection(map(short, measured_on)):
        raise EnvironmentFault(
            f"{len(both)} of the prompts to measure on were searched on with the scores in {path}",
            remedy="name others with --measure-on, or write --num-prompts 0",
        )
    return scores, made_by


def short(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
