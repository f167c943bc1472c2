"""`sdo prune` from a job to a folder: a plan per ratio, figures."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, solver_of
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import with_plan
from sdo_cli.errors import EnvironmentFault, Stopped
from sdo_cli.files import alone_in, remove_partial, write_json
from sdo_cli.installed import sdo
from sdo_cli.models.load import load_family
from sdo_cli.parallel.stopping import SafePoints, Stopping
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.plugins import loaded_plugins
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.prune.job import PruneJob
from sdo_cli.prune.measure import Arm, ArmMeasures, measure
from sdo_cli.prune.methods import controls
from sdo_cli.prune.plans import kept_schedules, make_plans
from sdo_cli.prune.scores import scores_file
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.tables import record, save_figures
from sdo_cli.runs.kept import Kept, identity_of, status_in
from sdo_cli.sampling.solvers import AUTO
from sdo_cli.scoring.latents import as_measure
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.skipping.skip_plan import SkipPlan, load_plan

MANIFEST, FIGURES = "manifest.json", "measures.json"


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
    files = {"scores": None if job.scores is None else scores_file(job.scores), "schedule": job.schedule}
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
    rewards = {
        item.name: as_measure(item.name, build_reward(item.name, item.options, device), setting.family)
        for item in spec.rewards
    }
    arms = [Arm(f"{job.method} {ratio:g}", setting.settings, plan, ratio) for ratio, plan in plans.items()]
    if spec.controls:
        reporter.note("step schedules for the controls")
        # its own is not its control
        find = partial(kept_schedules, setting, folder, reporter, world)
        beside = controls(setting, some_of(job.ratios), find, world)
        arms += [arm for arm in beside if not arm.name.startswith(job.method)]
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
    """At most three, spread, the highest among them: controls are up to a dozen each."""
    return ratios[::-1][:: -(-len(ratios) // 3)][::-1]


def _manifest(job: PruneJob, status: str, identity: dict[str, Any], world: World) -> dict[str, Any]:
    told = {"status": status, "command": command(), "written": now(), "versions": versions(), "job": _tree(job)}
    plugins = [asdict(plugin) for plugin in loaded_plugins()]
    return {**told, "plugins": plugins, "processes": world.size, "identity": identity}


def _tree(job: PruneJob) -> dict[str, Any]:
    told = replace(job, scores=None, schedule=None)
    tree = {key: value for key, value in asdict(told).items() if key not in ("scores", "schedule")}
    for name in ("scores", "schedule"):
        path = getattr(job, name)
        tree[name] = None if path is None else str(path)
    return tree
