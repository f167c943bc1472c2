"""How plans are made, by name, and the samplers with as much computation that stand beside every one."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from sdo_cli.drawing.pruned import prediction_of
from sdo_cli.errors import SolverFault
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.prune.baselines import deep_cache, random_gates, uniform
from sdo_cli.prune.learned import Learned, student_solver
from sdo_cli.prune.less_guidance import at_their_guidance
from sdo_cli.prune.lessons import SolverSettings
from sdo_cli.prune.measure import Arm
from sdo_cli.prune.ratios import runs_at
from sdo_cli.prune.schedules import Schedule, optimal_stepsize, pairwise
from sdo_cli.prune.setting import Setting
from sdo_cli.sampling.scheduler_config import is_flow
from sdo_cli.sampling.solvers import calls_of
from sdo_cli.seeding import key_to_seed, keyed_generator
from sdo_cli.skipping.skip_plan import SkipPlan

DIP_GO, LEARNED, SEGMENTS = "dip-go", "learned-solver", "segments"


def calls_at(ratio: float, calls: int) -> int:
    """Whole network calls that the budget allows, at least one."""
    return max(1, int((1 - ratio) * calls + 1e-9))


def from_scores(setting: Setting, ratio: float, scores: Tensor, **made_by: object) -> SkipPlan:
    runs = runs_at(ratio, scores, setting.wiring, setting.budget)
    return setting.plan(runs, method=DIP_GO, ratio=ratio, **made_by)


def from_uniform(setting: Setting, ratio: float) -> SkipPlan:
    runs = uniform(ratio, setting.calls, setting.wiring, setting.budget)
    return setting.plan(runs, method="uniform", ratio=ratio)


def from_deep_cache(setting: Setting, ratio: float) -> SkipPlan:
    runs = deep_cache(ratio, setting.calls, setting.wiring, setting.budget)
    return setting.plan(runs, method="deepcache", ratio=ratio)


def from_chance(setting: Setting, ratio: float) -> SkipPlan:
    generator = keyed_generator(setting.seed, "prune-random", round(1000 * ratio))
    runs = random_gates(ratio, setting.calls, setting.wiring, setting.budget, generator=generator)
    return setting.plan(runs, method="random", ratio=ratio)


# make(setting, ratio) -> plan
METHODS: dict[str, Callable[[Setting, float], SkipPlan]] = {
    "uniform": from_uniform,
    "deepcache": from_deep_cache,
    "random": from_chance,
}
SCHEDULES = ("optimal-steps", "pairwise-steps")
# samples a schedule is found on
TEACHERS = 8


def schedules(
    setting: Setting, method: str, most: int, *, reporter: Reporter | None = None, world: World = SINGLE
) -> dict[int, Schedule]:
    """Step schedules of every number of steps up to ``most``, found on a few of the search's prompts.

    Args:
        world: shares out Optimal Stepsize's network calls; every process walks the teacher's path itself.

    Raises:
        SolverFault: the solver carries history, so no step can be left out of its walk.
    """
    prompts = setting.prompts_of(0, min(TEACHERS, len(setting.prompts)))
    seeds = [key_to_seed(setting.seed, "prune-schedule", j) for j in range(len(prompts))]
    path = setting.path(prompts, seeds)
    # on prompts of the search plain costs were better than carried ones at a tenth and a fifth of the steps
    found = (
        optimal_stepsize(path, most, reporter=reporter, world=world)
        if method == "optimal-steps"
        else pairwise(path, carried=False)
    )
    return world.share(lambda: found)


def from_schedule(setting: Setting, schedule: Schedule, method: str, ratio: float) -> SkipPlan:
    """A plan that skips nothing of fewer, chosen steps."""
    shorter = replace(
        setting.made_for, num_inference_steps=len(schedule.timesteps), timesteps=tuple(schedule.timesteps)
    )
    runs = torch.ones(len(schedule.timesteps), len(setting.wiring.units), dtype=torch.bool)
    made_by = {"guidance_scale": setting.settings.guidance_scale, "method": method, "ratio": ratio}
    return SkipPlan(shorter, setting.grain, setting.wiring, runs, made_by)


def from_learned(setting: Setting, learned: Learned, ratio: float, wanted: SolverSettings) -> SkipPlan:
    """A plan that skips nothing of a learned solver's steps."""
    flow = is_flow(setting.family.scheduler_config)
    own = replace(
        setting.made_for,
        solver=student_solver(flow),
        num_inference_steps=len(learned.timesteps),
        timesteps=learned.timesteps,
        multistep=learned.numbers,
        prediction=prediction_of(setting.family),
    )
    runs = torch.ones(len(learned.timesteps), len(setting.wiring.units), dtype=torch.bool)
    made_by = {
        "guidance_scale": setting.settings.guidance_scale,
        "method": LEARNED,
        "ratio": ratio,
        "teacher": {"solver": setting.made_for.solver, "num_inference_steps": setting.made_for.num_inference_steps},
        "distance": {"start": learned.begun, "learned": learned.error},
        **asdict(wanted),
    }
    return SkipPlan(own, setting.grain, setting.wiring, runs, made_by)


# find(method, most) -> schedules by number of steps
FindSchedules = Callable[[str, int], dict[int, Schedule]]


def controls(
    setting: Setting, ratios: list[float], find: FindSchedules | None = None, world: World = SINGLE
) -> list[Arm]:
    """For every ratio the samplers with as much computation at most, none of which was learned but the schedules.

    Those of fewer steps a second time, where they are nearer to the full sampler with less guidance.
    """
    found = list[Arm]()
    find = find or partial(schedules, setting)
    found_schedules = {name: _schedules_or_none(setting, name, ratios, find) for name in SCHEDULES}
    for ratio in ratios:
        k, steps_alone = calls_at(ratio, setting.calls), list[Arm]()
        for solver in _plain_solvers(setting):
            steps = max(1, k - (calls_of(solver, k) - k))
            shorter = replace(setting.settings, solver=solver, num_inference_steps=steps, timesteps=None)
            steps_alone.append(Arm(f"{solver}-{steps}", shorter, None, ratio))
        for name, table in found_schedules.items():
            if table is not None:
                plan = from_schedule(setting, table[k], name, ratio)
                steps_alone.append(Arm(f"{name}-{k}", setting.settings, plan, ratio))
        found += [*steps_alone, *at_their_guidance(setting, steps_alone, world)]
        for name, make in METHODS.items():
            found.append(Arm(f"{name} {ratio:g}", setting.settings, make(setting, ratio), ratio))
    return found


def _plain_solvers(setting: Setting) -> list[str]:
    """The full sampler's own, a better one of second order, and the one a learned solver starts as."""
    own = setting.made_for.solver
    return [own] if is_flow(setting.family.scheduler_config) else list(dict.fromkeys((own, "dpm++2m", "ipndm")))


def _schedules_or_none(
    setting: Setting, method: str, ratios: list[float], find: FindSchedules
) -> dict[int, Schedule] | None:
    try:
        return find(method, max(calls_at(ratio, setting.calls) for ratio in ratios))
    except SolverFault:
        # one that carries history has no such control
        return None
