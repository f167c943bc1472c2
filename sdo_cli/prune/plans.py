"""One plan per ratio, by any method; what a method has found is kept, so that a job goes on."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from sdo_cli.errors import SolverFault
from sdo_cli.files import write_json
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.prune.job import PruneJob
from sdo_cli.prune.learned import Learned, best_of, learn, spaced
from sdo_cli.prune.lessons import Lessons
from sdo_cli.prune.methods import (
    DIP_GO,
    LEARNED,
    METHODS,
    SCHEDULES,
    SEGMENTS,
    calls_at,
    from_learned,
    from_schedule,
    from_scores,
    schedules,
)
from sdo_cli.prune.schedules import Schedule
from sdo_cli.prune.scores import SAVE_EVERY, keep_scores
from sdo_cli.prune.segments import Evolution, evolve
from sdo_cli.prune.setting import Setting
from sdo_cli.runs.kept import Kept
from sdo_cli.skipping.skip_plan import SkipPlan

FRONT = "front.json"


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
    if job.method == SEGMENTS:
        return segment_plans(setting, job, folder, reporter, world)
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
    lessons.ahead = {t for grid in grids.values() for t in grid}
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
                if state["number"] == 0:
                    continue
                begun, error = state["errors"]
                reporter.advance(1, f"distance {error:.4f} (at first {begun:.4f})")
        finally:
            if state is not None and world.is_main:
                kept.put(name, state)
        assert state is not None
        best = best_of(state)
        reporter.note(
            f"{calls} calls: distance to the full sampler's latents {best.error:.4f}, of {wanted.start} at these steps"
            f" {best.begun:.4f}"
        )
        # the same on all, whatever their devices made of it
        found[calls] = world.share(partial(_same, best))
    return {ratio: from_learned(setting, found[calls], ratio, wanted) for ratio, calls in budgets.items()}


def segment_plans(
    setting: Setting, job: PruneJob, folder: Path, reporter: Reporter, world: World = SINGLE
) -> dict[float, SkipPlan]:
    """The nearest plan of segments for every budget; one evolution serves them all."""
    kept, found = Kept(folder), Evolution(setting, job.segments, job.ratios)
    if len(found.ways) == 1:
        reporter.note("this network has no branch beside the whole: segments are whole calls, repeated")
    if state := world.share(partial(kept.get, SEGMENTS)):
        found.go_on(state)
    reporter.phase("generations", job.segments.generations, found.generation)
    for now_at in evolve(found, world):
        if world.is_main:
            kept.put(SEGMENTS, now_at.state())
        _, distance = now_at.drawn[now_at.best(job.ratios[-1])]
        reporter.advance(1, f"{len(now_at.drawn)} drawn, distance at {job.ratios[-1]:g}: {distance:.4f}")
    front = [
        {"segments": [list(gene) for gene in genes], "kept": share, "distance": distance}
        for genes, share, distance in found.front()
    ]
    if world.is_main:
        write_json(folder / FRONT, {"branches": [sorted(_named(setting, way)) for way in found.ways], "front": front})
    plans = {}
    for ratio in job.ratios:
        genes = found.best(ratio)
        told = {**asdict(job.segments), "segments": [list(gene) for gene in genes], "found": found.drawn[genes][1]}
        plans[ratio] = setting.plan(found.runs(genes), method=SEGMENTS, ratio=ratio, **told)
    return plans


def _named(setting: Setting, units: frozenset[int]) -> list[str]:
    return [setting.wiring.units[number] for number in units]


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
