"""`sdo prune` from a job to a folder: keep-scores, a plan per ratio, figures."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, solver_of
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import with_plan
from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import append_json_line, write_atomic, write_json
from sdo_cli.installed import sdo
from sdo_cli.models.load import load_family
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.prune.job import PruneJob
from sdo_cli.prune.measure import Arm, ArmMeasures, measure
from sdo_cli.prune.methods import DIP_GO, METHODS, SCHEDULES, calls_at, controls, from_schedule, from_scores, schedules
from sdo_cli.prune.search import search
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.tables import record, save_figures
from sdo_cli.sampling.solvers import AUTO
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.skipping.skip_plan import SkipPlan, load_plan

SCORES, SEARCH, MANIFEST, FIGURES = "scores.safetensors", "search.jsonl", "manifest.json", "measures.json"
# keep-scores are kept so often that little is lost
SAVE_EVERY = 25


def prune(job: PruneJob, folder: Path, reporter: Reporter) -> list[ArmMeasures]:
    """Search, write plans, measure; ``folder`` is new.

    Returns:
        The full sampler, the plans in the order of the ratios, then the controls.
    """
    setting = open_setting(job, reporter)
    folder.mkdir(parents=True, exist_ok=True)
    status = "failed"
    try:
        plans = make_plans(setting, job, folder, reporter)
        for ratio, plan in plans.items():
            plan.save(plan_file(folder, ratio))
        found = measure_plans(setting, job, plans, folder, reporter)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        write_json(folder / MANIFEST, _manifest(job, status))
    return found


def plan_file(folder: Path, ratio: float) -> Path:
    return folder / f"plan-{ratio:.2f}.json"


def open_setting(job: PruneJob, reporter: Reporter) -> Setting:
    """The model, with its prompts encoded and text encoders freed."""
    device, dtype = pick_device(), dtype_of(job.precision)
    settings = job.settings if job.schedule is None else scheduled(job.settings, job.schedule)
    family = load_family(job.source, dtype=dtype)
    if settings.solver == AUTO and solver_of(family, settings) == "pndm":
        settings = replace(settings, solver="ddim")
        reporter.note("solver auto: ddim in place of the model's pndm, whose calls carry history from one to the next")
    if job.lora is not None:
        family.load_lora(job.lora, scale=job.lora_scale)
    every = [*job.prompts, *job.measure.prompts]
    for sentence in drawing_notes(family, every, settings):
        reporter.note(sentence)
    embed = PromptEmbeddings(family)
    embed.prepare(every, settings.negative_prompt, device)
    family.to(device, dtype)
    return Setting(family, job.source, embed, settings, job.prompts, job.grain, job.seed)


def scheduled(settings: DrawSettings, path: Path) -> DrawSettings:
    """With the chosen steps of a plan, and the solver they were chosen for.

    Raises:
        EnvironmentFault: a plan without steps of its own, or for another solver than the one asked for.
    """
    plan = load_plan(path)
    solver = plan.made_for.solver
    if plan.made_for.timesteps is None:
        raise EnvironmentFault(
            f"{path} has no steps of its own",
            remedy=f"make one with {sdo('prune', '--method', 'optimal-steps')}, or pairwise-steps",
        )
    if settings.solver not in (AUTO, solver):
        raise EnvironmentFault(f"the steps in {path} were chosen for the solver {solver}", remedy="leave --solver out")
    return with_plan(replace(settings, solver=solver), plan)


def make_plans(setting: Setting, job: PruneJob, folder: Path, reporter: Reporter) -> dict[float, SkipPlan]:
    """One plan per ratio; one search serves them all."""
    if job.method == DIP_GO:
        scores, made_by = keep_scores(setting, job, folder, reporter)
        return {ratio: from_scores(setting, ratio, scores, **made_by) for ratio in job.ratios}
    if job.method in SCHEDULES:
        reporter.note(f"{job.method}: a teacher of {setting.calls} steps")
        table = schedules(setting, job.method, max(calls_at(ratio, setting.calls) for ratio in job.ratios))
        return {
            ratio: from_schedule(setting, table[calls_at(ratio, setting.calls)], job.method, ratio)
            for ratio in job.ratios
        }
    return {ratio: METHODS[job.method](setting, ratio) for ratio in job.ratios}


def keep_scores(setting: Setting, job: PruneJob, folder: Path, reporter: Reporter) -> tuple[Tensor, dict[str, Any]]:
    """``[calls, units]``, trained or of an earlier search, and what they were made with."""
    if job.scores is not None:
        scores, made_by = load_scores(job.scores, setting, job.measure.prompts)
        save_scores(folder / SCORES, scores, setting, made_by)
        return scores, made_by
    made_by = {
        "search": asdict(job.search),
        "prompts": len(job.prompts),
        "seed": job.seed,
        "guidance_scale": setting.settings.guidance_scale,
    }
    reporter.phase("search", job.search.updates)
    begun, done = time.perf_counter(), None
    try:
        for done in search(setting, job.search):
            line = {"update": done.number, "distance": done.distance, "kept": done.kept}
            append_json_line(folder / SEARCH, line | {"seconds": time.perf_counter() - begun})
            if done.number % SAVE_EVERY == 0:
                save_scores(folder / SCORES, done.scores, setting, made_by | {"updates_done": done.number})
            reporter.advance(1, f"distance {done.distance:.4f}  kept {done.kept:.0%}")
    finally:
        if done is not None:
            save_scores(folder / SCORES, done.scores, setting, made_by | {"updates_done": done.number})
    assert done is not None
    scores = done.scores
    return scores, made_by


def save_scores(path: Path, scores: Tensor, setting: Setting, made_by: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    about: dict[str, Any] = {
        "made_for": asdict(setting.made_for),
        "grain": setting.grain,
        "units": setting.wiring.units,
    }
    about["searched_on"] = sorted(map(_short, setting.prompts))
    told = {"about": json.dumps(about), "made_by": json.dumps(made_by)}
    write_atomic(path, lambda temporary: save_file({"scores": scores.contiguous()}, temporary, metadata=told))


def load_scores(folder: Path, setting: Setting, measured_on: Sequence[str] = ()) -> tuple[Tensor, dict[str, Any]]:
    """Those of an earlier search.

    Raises:
        EnvironmentFault: none there, of another model, solver or grain, or searched on what is to be measured on.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / SCORES if folder.is_dir() else folder
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
    if both := set(about.get("searched_on", ())).intersection(map(_short, measured_on)):
        raise EnvironmentFault(
            f"{len(both)} of the prompts to measure on were searched on with the scores in {path}",
            remedy="name others with --measure-on, or write --num-prompts 0",
        )
    return scores, made_by


def _short(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def measure_plans(
    setting: Setting, job: PruneJob, plans: dict[float, SkipPlan], folder: Path, reporter: Reporter
) -> list[ArmMeasures]:
    """Figures of every plan, put into its file, and of the controls; written after each."""
    spec, device = job.measure, setting.family.device
    if not spec.prompts:
        return []
    rewards = {item.name: build_reward(item.name, item.options, device) for item in spec.rewards}
    arms = [Arm(f"{job.method} {ratio:g}", setting.settings, plan, ratio) for ratio, plan in plans.items()]
    if spec.controls:
        reporter.note("step schedules for the controls")
        # its own is not its control
        arms += [arm for arm in controls(setting, some_of(job.ratios)) if not arm.name.startswith(job.method)]
    found = list[ArmMeasures]()
    for measured in measure(
        setting, arms, spec.prompts, rewards,
        reporter=reporter, seed=job.seed, batch_size=spec.batch_size, rounds=spec.rounds,
    ):  # fmt: skip
        found.append(measured)
        tree = record(found, setting.flops)
        write_json(folder / FIGURES, {"written": now(), "machine": machine(), "versions": versions(), **tree})
        if measured.arm.ratio in plans and measured.arm.plan is plans[measured.arm.ratio]:
            row = tree["arms"][-1]
            plan = measured.arm.plan.with_measures(cost=row["cost"], quality=row["quality"])
            plan.save(plan_file(folder, measured.arm.ratio))
    save_figures(found, folder)
    return found


def some_of(ratios: list[float]) -> list[float]:
    """At most three, spread, the highest among them: controls are seven each."""
    return ratios[::-1][:: -(-len(ratios) // 3)][::-1]


def _manifest(job: PruneJob, status: str) -> dict[str, Any]:
    told = replace(job, scores=None, schedule=None)
    tree = {key: value for key, value in asdict(told).items() if key not in ("scores", "schedule")}
    for name in ("scores", "schedule"):
        path = getattr(job, name)
        tree[name] = None if path is None else str(path)
    return {"status": status, "command": command(), "written": now(), "versions": versions(), "job": tree}
