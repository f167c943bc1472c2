"""One fine-tuning job from recipe to run folder."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

import rewards
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.errors import Stopped
from sdo_cli.files import alone_in, append_json_line, without_nan, write_json, write_text
from sdo_cli.gradients.outcome import added
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.parallel.shards import described
from sdo_cli.parallel.stopping import SafePoints, Stopping
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.provenance import now
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.toys import with_names_of
from sdo_cli.records.check import said_of
from sdo_cli.records.step import StepResult, step_result
from sdo_cli.runs.checkpoint import Checkpoint, restore, save
from sdo_cli.runs.folder import manifest, write_recipe
from sdo_cli.runs.read import CHECKS, MANIFEST, METRICS, manifest_of
from sdo_cli.runs.resume import cut_lines, find, identity
from sdo_cli.runs.summary import RunSummary
from sdo_cli.runs.trackers import Trackers
from sdo_cli.scoring.rewards import reading_notes
from sdo_cli.scoring.statistics import paired_gain
from sdo_cli.training import outputs
from sdo_cli.training.guard import Guard, make_guard
from sdo_cli.training.job import Job
from sdo_cli.training.loop import make_stepper, train
from sdo_cli.training.overview import overview
from sdo_cli.training.passes import go_on, where_it_is
from sdo_cli.training.prepare import prepare
from sdo_cli.training.replays import Replays
from sdo_cli.training.validate import Validation


@dataclass
class Run:
    """Everything one run works with."""

    loaded: LoadedRecipe
    job: Job
    validation: Validation | None
    guard: Guard | None
    folder: Path
    reporter: SafePoints
    trackers: Trackers
    begin: Checkpoint | None
    replays: Replays
    also: outputs.Also = None
    on_step: Callable[[StepResult], None] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.job.world.is_main


def finetune(
    loaded: LoadedRecipe,
    folder: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    stopping: Stopping | None = None,
    world: World = SINGLE,
    also: outputs.Also = None,
    on_step: Callable[[StepResult], None] | None = None,
) -> RunSummary:
    """Run the whole job into ``folder``, which all processes share.

    The weights are saved as soon as training ends; card and a manifest with status ``finished`` come last.

    Args:
        resume: go on from the newest complete checkpoint in ``folder``, if there is one.
        stopping: asked at every safe point.
        world: the processes that do it together; each calls this function.
        also: writes every LoRA in other formats too.
        on_step: gets every step as it is written down.

    Raises:
        Stopped: there was a reason to; a checkpoint of the last step is there if any step was taken.
    """
    begin = find(loaded, folder, reporter, world) if resume else None
    if begin is not None:
        # before and after stand in one table
        loaded = replace(loaded, recipe=with_names_of(loaded.recipe, begin.run))
    reporter.note(overview(loaded, begin.step if begin else 0))
    for sentence in loaded.notes:
        reporter.note(sentence)
    job, validation = prepare(loaded, world, whole_file=False)
    guard = make_guard(loaded, job, validation)
    for spec in (*loaded.recipe.rewards, *loaded.recipe.validation.rewards):
        if spec.name in rewards.SHORT:
            reporter.note(f"reward {spec.name}: the newest version, {rewards.full_name(spec.name)}")
    drawn = [*job.prompts, *(validation.prompts if validation else ()), *(guard.validation.prompts if guard else ())]
    for sentence in drawing_notes(job.family, drawn, job.draw_settings):
        reporter.note(sentence)
    scored = {item.name: item.reward for item in job.rewards} | (validation.rewards if validation else {})
    for sentence in reading_notes(scored, drawn):
        reporter.note(sentence)
    for sentence in loaded.prompt_notes():
        reporter.note(sentence)
    if job.spreads is not None and job.spreads.only and begin is None:
        reporter.note(f"combine.normalise: draws and scores {job.spreads.only} pictures before the first step")
    if world.size > 1:
        reporter.note(f"{world.size} processes; a step is {job.global_batch} samples")
    if world.sharded:
        reporter.note(described(job.family.denoiser, world.size))
    if world.zero is not None:
        reporter.note(world.zero.described(world.size))
    with _folder_of_ours(folder, world):
        trackers = Trackers(loaded.recipe.trackers if world.is_main else [], folder, identity(loaded, world.size))
        replays = Replays.after(begin.step if begin else 0, loaded.recipe.rollout.drift_steps)
        points = SafePoints(reporter, stopping or Stopping(world=world))
        return _recorded(Run(loaded, job, validation, guard, folder, points, trackers, begin, replays, also, on_step))


@contextmanager
def _folder_of_ours(folder: Path, world: World) -> Iterator[None]:
    """Made, and locked by the first process."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) if world.is_main else nullcontext():
        yield


def _recorded(run: Run) -> RunSummary:
    """With a manifest that says how it ended."""
    status, summary = "failed", None
    before = manifest_of(run.folder) if run.begin is not None and run.is_main else {}
    started = before.get("started", now())

    def record(status: str) -> None:
        if run.is_main:
            stopped = summary.stopped_at if summary else None
            tree = manifest(run.loaded, run.job.family.name, status, started, before)
            write_json(run.folder / MANIFEST, {**tree, "processes": run.job.world.size, "stopped_at": stopped})

    def lost() -> None:
        record("failed")
        run.reporter.close()

    if run.is_main:
        write_recipe(run.loaded, run.folder)
    record("running")
    # when another process fails there is no way back to here
    run.job.world.peers.before_the_end = lost
    try:
        summary = _train_and_measure(run)
        status = "finished"
    except (KeyboardInterrupt, Stopped):
        status = "interrupted"
        raise
    finally:
        run.job.world.peers.before_the_end = None
        record(status)
        run.trackers.end()
    return summary


def _train_and_measure(run: Run) -> RunSummary:
    job, folder, guard = run.job, run.folder, run.guard
    before, first_grid = outputs.scores_before(job, run.validation, folder, run.reporter, resumed=run.begin is not None)
    guided = outputs.guided_before(job, run.validation, folder, run.reporter, resumed=run.begin is not None)
    stepper = make_stepper(job)
    results = _go_back(run, stepper)
    if guard is not None and not guard.checks:
        _check(run, stepper, 0)
    stopped_at = _train(run, stepper, results, first_grid)
    seconds = added([result.seconds for result in results])
    # before anything else that could fail
    outputs.save_weights(job, folder, run.also)
    after = outputs.measure(job, run.validation, "held-out, after", run.reporter)
    steps = results[-1].step if results else 0
    outputs.draw_grid(job, run.validation, first_grid, folder, steps, guided)

    gains = {name: paired_gain(before[name], after[name]) for name in before}
    trained_on = [item.name for item in job.rewards]
    best = guard.best_step or None if guard is not None else None
    means = {name: rows.mean().item() for name, rows in guided.scores.items()}
    summary = RunSummary(folder, gains, trained_on, seconds, steps, best, stopped_at, means)
    if run.is_main:
        scores = {"before": before, "after": after} | ({"guided": guided.scores} if guided.scores else {})
        outputs.write_results(job, run.loaded, run.validation, summary, results, scores)
    return summary


def _go_back(run: Run, stepper: Stepper) -> list[StepResult]:
    """Everything as it was at the checkpoint, and the results up to it; nothing without one."""
    start = run.begin.step if run.begin else 0
    rows = run.job.world.share(lambda: cut_lines(run.folder / METRICS, start))
    if run.begin is not None:
        state = restore(run.begin, stepper, rank=run.job.world.rank)
        if run.guard is not None and state["guard"] is not None:
            run.guard.load_state(state["guard"])
            outputs.save_best(run.job, run.guard, run.folder, run.also)
    if run.is_main and run.guard is not None:
        lines = [json.dumps(without_nan(asdict(check))) + "\n" for check in run.guard.checks]
        write_text(run.folder / CHECKS, "".join(lines))
    results = [step_result(row) for row in rows]
    if run.job.rollouts is not None and results:
        run.job.rollouts.on = results[-1].cheap_rollouts
    if run.begin is not None and state["replays"] is not None:
        go_on(run.job, run.replays, state["replays"])
    return results


def _train(run: Run, stepper: Stepper, results: list[StepResult], first_grid: Tensor | None) -> int | None:
    """All steps; the step at which the guard ended them, if it did."""
    job, recipe, folder = run.job, run.job.recipe, run.folder
    start, last = run.begin.step if run.begin else 0, recipe.max_train_steps
    every, grids, checks = recipe.checkpointing_steps, recipe.validation.grid_steps, recipe.guard.steps

    def is_due(step: int) -> bool:
        return bool(checks) and (step % checks == 0 or step == last)

    def check(step: int) -> bool:
        try:
            return _check(run, stepper, step)
        except Stopped:
            _save(run, stepper, step)
            raise

    if run.guard is not None and start:
        # stopped in the middle of a check, or after the one that ended training
        if is_due(start) and run.guard.checks[-1].step < start:
            check(start)
        if recipe.guard.stop and run.guard.is_over(recipe.guard.patience):
            stepper.finish()
            return start
    run.reporter.phase("training", last, start)
    for result in train(job, stepper=stepper, start=start, replays=run.replays):
        results.append(result)
        _write_step(run, result)
        if run.on_step is not None and run.is_main:
            try:
                run.on_step(result)
            # somebody else's code: whatever it raises, no step is lost
            except BaseException:
                _save(run, stepper, result.step)
                raise
        stop = False
        if grids and result.step % grids == 0 and result.step < last:
            outputs.draw_grid(job, run.validation, first_grid, folder, result.step)
        if is_due(result.step):
            stop = check(result.step)
        # what came before a skipped step is in the checkpoint before it; weights that make nonsense are in none
        if every and not result.skipped and (result.step % every == 0 or result.step == last or stop):
            _save(run, stepper, result.step)
        if stop:
            stepper.finish()
            return result.step
        shown = "  ".join(f"{name} {value:.4f}" for name, value in result.rewards.items())
        try:
            run.reporter.advance(1, f"{shown}  loss {result.loss:.4f}  |g| {result.grad_norm:.2e}")
        except Stopped:
            _save(run, stepper, result.step)
            raise
    return None


def _write_step(run: Run, result: StepResult) -> None:
    if not run.is_main:
        return
    append_json_line(run.folder / METRICS, without_nan(asdict(result)))
    run.trackers.log(
        {
            **{f"train/{name}": value for name, value in result.rewards.items()},
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/penalty": result.penalty,
            **({f"rollout/{key}": value for key, value in asdict(result.drift).items()} if result.drift else {}),
            **({f"replay/{key}": value for key, value in asdict(result.replay).items()} if result.replay else {}),
        },
        result.step,
    )
    if result.drift is not None:
        run.reporter.note(drift_said(result, run.job.recipe.rollout.max_drift))
    if result.skipped:
        run.reporter.note(f"step {result.step} skipped: a reward or the gradient was not finite")


def drift_said(result: StepResult, limit: float) -> str:
    """A line on how far cheap rollouts are, and whether they are over."""
    assert result.drift is not None
    found = f"step {result.step}: rollouts end {result.drift.distance:.1%} from those in full"
    found += f", cosine of the gradients {result.drift.cosine:.2f}"
    if result.drift.loss is not None:
        found += f", loss {result.drift.loss:+.4g}"
    over = f"; that is more than rollout.max_drift {limit:g}: training draws in full from here on"
    return found + ("" if result.cheap_rollouts else over)


def _save(run: Run, stepper: Stepper, step: int) -> None:
    """A checkpoint; every process adds its random state, the first writes."""
    world, keep = run.job.world, run.job.recipe.checkpoints_total_limit
    state = run.guard.state() if run.guard is not None else None
    kept, what = where_it_is(run.job, run.replays), identity(run.loaded, world.size)

    def adapter(folder: Path) -> None:
        with stepper.kept_weights():
            outputs.write_adapter(run.job, folder, run.also)

    usable = adapter if run.job.recipe.train == "lora" else None
    save(run.folder, step, stepper, what, keep=keep, guard=state, replays=kept, world=world, adapter=usable)
    if run.job.recipe.report == "live" and run.is_main:
        outputs.write_live_report(run.folder)


def _check(run: Run, stepper: Stepper, step: int) -> bool:
    """Draw and score a check; True when training has to end."""
    guard, recipe = run.guard, run.job.recipe
    assert guard is not None
    with stepper.kept_weights():
        check = guard.check(run.job, step, run.reporter.quiet())
        better = recipe.train == "lora" and guard.keep_if_best(run.job.parameters)
    if run.is_main:
        append_json_line(run.folder / CHECKS, without_nan(asdict(check)))
        run.trackers.log({f"guard/{name}": sum(v) / len(v) for name, v in check.values.items()}, step)
    run.reporter.note(f"check at step {step}: {said_of(check)}{'  best so far' if better else ''}")
    if better:
        outputs.save_best(run.job, guard, run.folder, run.also)
    if not guard.is_over(recipe.guard.patience) or (found := guard.verdict()) is None:
        return False
    stop = recipe.guard.stop
    if stop or found.bad == recipe.guard.patience:
        kept = (
            f"best/ holds step {found.best}"
            if guard.best is not None
            else f"of the trained steps {found.best} was best"
        )
        names = ", ".join(item.name for item in run.job.rewards)
        end = "training ends here" if stop else "guard.stop=true would end it here"
        run.reporter.note(f"over-optimisation at step {step}: {found.sentence(names)}; {kept}; {end}")
    return stop
