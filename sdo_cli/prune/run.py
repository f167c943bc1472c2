"""`sdo prune` from a job to a folder: keep-scores, a plan per ratio, figures."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, solver_of
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import with_plan
from sdo_cli.errors import EnvironmentFault, SolverFault, Stopped
from sdo_cli.files import alone_in, append_json_line, remove_partial, write_atomic, write_json, write_text
from sdo_cli.installed import sdo
from sdo_cli.models.load import load_family
from sdo_cli.parallel.stopping import SafePoints, Stopping
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.prune.job import PruneJob
from sdo_cli.prune.learned import Learned, Lessons, best_of, learn, spaced
from sdo_cli.prune.measure import Arm, ArmMeasures, measure
from sdo_cli.prune.methods import (
    DIP_GO,
    LEARNED,
    METHODS,
    SCHEDULES,
    calls_at,
    controls,
    from_learned,
    from_schedule,
    from_scores,
    schedules,
)
from sdo_cli.prune.schedules import Schedule
from sdo_cli.prune.search import Update, search
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.tables import record, save_figures
from sdo_cli.runs.kept import Kept, identity_of, status_in
from sdo_cli.runs.read import read_lines
from sdo_cli.sampling.solvers import AUTO
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.skipping.skip_plan import SkipPlan, load_plan

SCORES, SEARCH, MANIFEST, FIGURES = "scores.safetensors", "search.jsonl", "manifest.json", "measures.json"
# the search is kept so often that little is lost
SAVE_EVERY = 25


def prune(
    job: PruneJob, folder: Path, reporter: Reporter, *, stopping: Stopping | None = None, world: World = SINGLE
) -> list[ArmMeasures]:
    """Search, write plans, measure.

    The search's state, schedules and every arm's figures are kept: the same job goes on in the same folder, with any
    number of processes.

    Args:
        folder: new, or of the same job.
        stopping: asked after every update, batch of pictures and timing.
        world: the processes that do it together, in a folder they share.

    Returns:
        The full sampler, the plans in the order of the ratios, then the controls.

    Raises:
        Stopped: there was a reason to.
        RecipeFault: the folder holds another job.
    """
    identity = world.share(lambda: identity_in(job, folder))
    setting, points = open_setting(job, reporter), SafePoints(reporter, stopping or Stopping(world=world))

    def note(status: str) -> None:
        if world.is_main:
            write_json(folder / MANIFEST, _manifest(job, status, identity, world))

    with ExitStack() as stack:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(folder))
            remove_partial(folder)
        note("running")
        # when another process fails there is no way back to here
        world.peers.before_the_end = lambda: note("failed")
        status = "failed"
        try:
            plans = make_plans(setting, job, folder, points, world)
            for ratio, plan in plans.items() if world.is_main else ():
                plan.save(plan_file(folder, ratio))
            found = measure_plans(setting, job, plans, folder, points, world)
            status = "finished"
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        finally:
            world.peers.before_the_end = None
            note(status)
        if world.is_main:
            Kept(folder).clear()
    return found


def identity_in(job: PruneJob, folder: Path) -> dict[str, Any]:
    """What this job is; raises RecipeFault where ``folder`` holds another."""
    found = identity(job)
    status_in(folder, found)
    return found


def identity(job: PruneJob) -> dict[str, Any]:
    """What a job of pruning is, by dotted key: everything that changes what comes of it."""
    tree = _tree(job)
    prompts = {"prompts": tree.pop("prompts"), "measure.prompts": tree["measure"].pop("prompts")}
    files = {"scores": None if job.scores is None else _scores_file(job.scores), "schedule": job.schedule}
    return identity_of(tree, prompts, job.measure.rewards, {**files, "lora": job.lora})


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


def make_plans(
    setting: Setting, job: PruneJob, folder: Path, reporter: Reporter, world: World = SINGLE
) -> dict[float, SkipPlan]:
    """One plan per ratio; one search serves them all."""
    if job.method == DIP_GO:
        scores, made_by = keep_scores(setting, job, folder, reporter, world)
        return {ratio: from_scores(setting, ratio, scores, **made_by) for ratio in job.ratios}
    if job.method in SCHEDULES:
        reporter.note(f"{job.method}: a teacher of {setting.calls} steps")
        most = max(calls_at(ratio, setting.calls) for ratio in job.ratios)
        table = kept_schedules(setting, folder, reporter, world, job.method, most)
        return {
            ratio: from_schedule(setting, table[calls_at(ratio, setting.calls)], job.method, ratio)
            for ratio in job.ratios
        }
    if job.method == LEARNED:
        return learned_plans(setting, job, folder, reporter, world)
    return {ratio: METHODS[job.method](setting, ratio) for ratio in job.ratios}


def learned_plans(
    setting: Setting, job: PruneJob, folder: Path, reporter: Reporter, world: World = SINGLE
) -> dict[float, SkipPlan]:
    """A solver learned for every budget, fewest calls last; the teacher is drawn once."""
    if setting.path(setting.prompts[:1], [0]).route.takes_noise:
        raise SolverFault(
            f"a learned solver follows a sampler without fresh noise; {setting.made_for.solver} adds some here",
            remedy="write --eta 0, or choose another --solver, ddim say",
        )
    kept, wanted, lessons = Kept(folder), job.solver, Lessons(setting, job.solver)
    lessons.made = dict(enumerate(world.share(lambda: kept.get("teacher")) or ()))
    lessons.prepare(reporter)
    if world.is_main:
        kept.put("teacher", [lessons.made[j] for j in range(wanted.samples)])
    budgets = {ratio: calls_at(ratio, setting.calls) for ratio in job.ratios}
    if wanted.grid in SCHEDULES:
        table = kept_schedules(setting, folder, reporter, world, wanted.grid, max(budgets.values()))
        grids = {calls: table[calls].timesteps for calls in budgets.values()}
    else:
        grids = {calls: spaced(setting, calls, wanted.grid) for calls in budgets.values()}
    found = dict[int, Learned]()
    for calls, grid in grids.items():
        name = f"solver-{calls}"
        state = world.share(partial(kept.get, name))
        reporter.phase(f"solver of {calls} calls", wanted.updates, 0 if state is None else state["number"])
        try:
            for now_at in learn(setting, grid, wanted, lessons, state=state):
                state = now_at
                if world.is_main and state["number"] % SAVE_EVERY == 0:
                    kept.put(name, state)
                begun, error = state["errors"]
                reporter.advance(1, f"distance {error:.4f} (iPNDM {begun:.4f})")
        finally:
            if state is not None and world.is_main:
                kept.put(name, state)
        assert state is not None
        best = best_of(state)
        reporter.note(
            f"{calls} calls: distance to the full sampler's latents {best.error:.4f}, of iPNDM at these steps"
            f" {best.begun:.4f}"
        )
        # the same on all, whatever their devices made of it
        found[calls] = world.share(partial(_same, best))
    return {ratio: from_learned(setting, found[calls], ratio, wanted) for ratio, calls in budgets.items()}


def _same(found: Learned) -> Learned:
    return found


def kept_schedules(
    setting: Setting, folder: Path, reporter: Reporter, world: World, method: str, most: int
) -> dict[int, Schedule]:
    """Step schedules of a job that may have found them before."""
    kept, name = Kept(folder), f"{method}-{most}"
    table = world.share(lambda: kept.get(name))
    if table is None:
        found = schedules(setting, method, most, reporter=reporter, world=world)
        table = {count: (schedule.timesteps, schedule.error) for count, schedule in found.items()}
        if world.is_main:
            kept.put(name, table)
    return {count: Schedule(*entry) for count, entry in table.items()}


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
    about["searched_on"] = sorted(map(_short, setting.prompts))
    told = {"about": json.dumps(about), "made_by": json.dumps(made_by)}
    write_atomic(path, lambda temporary: save_file({"scores": scores.contiguous()}, temporary, metadata=told))


def _scores_file(folder: Path) -> Path:
    return folder / SCORES if folder.is_dir() else folder


def load_scores(folder: Path, setting: Setting, measured_on: Sequence[str] = ()) -> tuple[Tensor, dict[str, Any]]:
    """Those of an earlier search.

    Raises:
        EnvironmentFault: none there, of another model, solver or grain, or searched on what is to be measured on.
    """
    from safetensors import SafetensorError, safe_open

    path = _scores_file(folder)
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
    setting: Setting,
    job: PruneJob,
    plans: dict[float, SkipPlan],
    folder: Path,
    reporter: Reporter,
    world: World = SINGLE,
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
        find = partial(kept_schedules, setting, folder, reporter, world)
        arms += [arm for arm in controls(setting, some_of(job.ratios), find) if not arm.name.startswith(job.method)]
    found = list[ArmMeasures]()
    for measured in measure(
        setting, arms, spec.prompts, rewards,
        reporter=reporter, seed=job.seed, batch_size=spec.batch_size, rounds=spec.rounds,
        kept=Kept(folder), world=world,
    ):  # fmt: skip
        found.append(measured)
        if not world.is_main:
            continue
        tree = record(found, setting.flops)
        write_json(folder / FIGURES, {"written": now(), "machine": machine(), "versions": versions(), **tree})
        if measured.arm.ratio in plans and measured.arm.plan is plans[measured.arm.ratio]:
            row = tree["arms"][-1]
            plan = measured.arm.plan.with_measures(cost=row["cost"], quality=row["quality"])
            plan.save(plan_file(folder, measured.arm.ratio))
    if world.is_main:
        save_figures(found, folder)
    return found


def some_of(ratios: list[float]) -> list[float]:
    """At most three, spread, the highest among them: controls are seven each."""
    return ratios[::-1][:: -(-len(ratios) // 3)][::-1]


def _manifest(job: PruneJob, status: str, identity: dict[str, Any], world: World) -> dict[str, Any]:
    told = {"status": status, "command": command(), "written": now(), "versions": versions(), "job": _tree(job)}
    return {**told, "processes": world.size, "identity": identity}


def _tree(job: PruneJob) -> dict[str, Any]:
    told = replace(job, scores=None, schedule=None)
    tree = {key: value for key, value in asdict(told).items() if key not in ("scores", "schedule")}
    for name in ("scores", "schedule"):
        path = getattr(job, name)
        tree[name] = None if path is None else str(path)
    return tree
