"""Training as a function: a recipe, or a run that goes on."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli.api.given import Changes, Progress, as_command, overrides
from sdo_cli.api.objects import measured_too, registered_reward, registered_rule, unknown_objects, with_objects
from sdo_cli.api.progress import reporter_of
from sdo_cli.api.results import Run
from sdo_cli.errors import Interrupted, PluginFault, RecipeFault, Stopped
from sdo_cli.plugins import load_plugins, loaded_plugins
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.load import load_recipe as read_recipe
from sdo_cli.recipe.schema import Recipe
from sdo_cli.runs.again import check_places, load_run, plugins_of
from sdo_cli.runs.read import RECIPE

if TYPE_CHECKING:
    from sdo_cli.records.step import StepResult


def load_recipe(
    name: str | Path,
    changes: Changes = (),
    /,
    plugins: Iterable[Path | str] = (),
    **more: Any,
) -> LoadedRecipe:
    """A recipe file, or a shipped one by its name, checked.

    Args:
        changes: overrides, as ``{"lora.rank": 4}`` or ``["lora.rank=4"]``.
        plugins: Python files with rewards or rules of your own; their code runs.
        more: changes of keys without a dot: ``max_train_steps=60``.

    Raises:
        RecipeFault: with every problem found.
    """
    load_plugins(plugins)
    return read_recipe(str(name), overrides(changes, more))


def finetune(
    recipe: LoadedRecipe | Run | str | Path,
    changes: Changes = (),
    /,
    *,
    out: Path | str | None = None,
    rewards: Sequence[Any] = (),
    measure: Sequence[Any] = (),
    rule: Callable[..., Any] | str | None = None,
    resume: bool = False,
    progress: Progress = False,
    on_step: "Callable[[StepResult], bool | None] | None" = None,
    **more: Any,
) -> Run:
    """Train on the recipe's rewards, as `sdo finetune` does.

    Args:
        recipe: of :func:`load_recipe`, or its name or path; or a :class:`Run` (or its folder), which goes on as it was.
        changes, more: overrides, as for :func:`load_recipe`; of a run only budget and logging may change.
        out: the run's folder; default ``<output_dir>/<recipe>-<time>``.
        rewards: names, and objects with ``score(images, prompts) -> [B]`` (images ``[B, 3, H, W]`` in [0, 1], gradients
            flowing), in place of the recipe's; ``(reward, weight)`` for another weight than 1. An object is known by
            its ``name``, else by its class's. For a run: the objects it was trained on, once more.
        measure: rewards of the same kinds that are only measured on the held-out prompts, beside the recipe's.
        rule: a name, or a function ``(calls, batch, coefficients, generator) -> Plan`` (docs/plugins.md), known by its
            name; in place of the recipe's rule.
        resume: go on from the newest checkpoint in ``out``.
        progress: True for bars, or a function that gets a :class:`Told` at every sign of progress.
        on_step: gets every optimizer step's figures. When it returns False, or raises, a checkpoint is saved and
            training ends there.

    Returns:
        The run; a finished one that is given again is left as it is.

    Raises:
        SdoError: bad input, missing weights, a reward without a gradient (before anything is drawn).
        Interrupted: stopped by a signal, an interrupted cell or ``on_step``, and saved.
    """
    run = _run_in(recipe)
    if run is not None:
        if out is not None:
            raise RecipeFault([f"out: the run goes on in its own folder, {run}; leave it out"], what="call")
        loaded, out, resume = _as_it_was(run, overrides(changes, more), rewards, measure, rule), run.folder, True
    else:
        loaded = _loaded(recipe, changes, more)
        loaded = measured_too(with_objects(loaded, rewards, rule), measure)
    if resume and out is None:
        text = "resume=True: goes on in out=FOLDER; name it, or give the run: finetune(Run(…))"
        raise RecipeFault([text], what="call")
    if resume and not Path(str(out)).is_dir():
        raise RecipeFault([f"out={out}: there is no run to go on with"], what="call")
    from sdo_cli.exporting.export import kohya_writer
    from sdo_cli.models.load import source_of
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.runs.folder import new_run_folder
    from sdo_cli.runs.resume import finished
    from sdo_cli.training.run import finetune as train

    folder = Path(str(out)) if resume else _new_folder(loaded, out, new_run_folder)
    if resume and finished(loaded, folder):
        return Run(folder)
    also = kohya_writer(source_of(loaded.recipe), loaded.name) if loaded.recipe.lora.kohya else None
    words = ["finetune", "--recipe", loaded.given, *loaded.overrides, "--out", str(folder)]
    with as_command(words), reporter_of(progress) as reporter, Stopping(None, reporter.note) as stopping:
        try:
            train(loaded, folder, reporter, resume=resume, stopping=stopping, also=also, on_step=_ended_by(on_step))
        except Stopped as stop:
            what = f"stopped ({stop.reason}); what is done is kept in {folder}/"
            given = ", rewards=[…]" if any(not isinstance(_first(item), str) for item in rewards) else ""
            raise Interrupted(what, remedy=f'go on with: finetune(Run("{folder}"){given})') from None
    return Run(folder)


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, tuple) else item


def _ended_by(on_step: "Callable[[StepResult], bool | None] | None") -> "Callable[[StepResult], None] | None":
    """Stops where the function says so, or is interrupted."""
    if on_step is None:
        return None

    def call(result: "StepResult") -> None:
        try:
            ends = on_step(result) is False
        except KeyboardInterrupt:
            raise Stopped("KeyboardInterrupt") from None
        if ends:
            raise Stopped("on_step returned False")

    return call


def _run_in(recipe: Any) -> Run | None:
    """The run that is meant, if one is."""
    if isinstance(recipe, Run):
        return recipe
    is_folder = isinstance(recipe, str | Path) and (Path(recipe) / RECIPE).is_file()
    return Run(recipe) if is_folder else None


def _loaded(recipe: Any, changes: Changes, more: dict[str, Any]) -> LoadedRecipe:
    if isinstance(recipe, Recipe):
        raise RecipeFault(["recipe: a run's recipe alone; give the run itself, finetune(Run(…))"], what="call")
    if not isinstance(recipe, LoadedRecipe):
        return load_recipe(recipe, changes, **more)
    if changes or more:
        names = ", ".join(overrides(changes, more))
        raise RecipeFault([f"{names}: changes belong into load_recipe(…), or give the recipe by name"], what="call")
    return recipe


def _as_it_was(
    run: Run, words: list[str], rewards: Sequence[Any], measure: Sequence[Any], rule: Callable[..., Any] | str | None
) -> LoadedRecipe:
    """The recipe of a run, its plug-ins loaded, its objects registered by their names.

    Raises:
        PluginFault: a plug-in that changed, or lies in the run's own folder: load it by hand first.
        RecipeFault: rewards that the run does not have, or with other weights; objects that were not given again.
    """
    load_own_plugins(run)
    for item in (*rewards, *measure):
        registered_reward(_first(item))
    if rule is not None and not isinstance(rule, str):
        registered_rule(rule)
    own = load_run(run.folder, checked=False).recipe
    if gone := unknown_objects(own):
        text = f"the run has {', '.join(gone)}, given as an object: give it again, finetune(Run(…), rewards=[…])"
        raise RecipeFault([text], what="call")
    if wrong := not_as_there(own, rewards):
        raise RecipeFault(wrong, what=f"call: the run {run} goes on as it was")
    loaded = load_run(run.folder, words)
    check_places(loaded.recipe, run.folder, how="put it there, or give its place by name: model=…")
    return loaded


def not_as_there(recipe: Recipe, rewards: Sequence[Any]) -> list[str]:
    """What is given otherwise than the run has it."""
    weights, wrong = {spec.name: spec.weight for spec in recipe.rewards}, []
    for item in rewards:
        name = registered_reward(_first(item))
        known = next((n for n in weights if name in (n, *_other_names(n))), None)
        if known is None:
            wrong.append(f"rewards: {name} is none of the run's: {', '.join(weights)}")
        elif isinstance(item, tuple) and float(item[1]) != weights[known]:
            wrong.append(f"rewards: {name} has the weight {weights[known]:g} there, {float(item[1]):g} here")
    return wrong


def _other_names(name: str) -> list[str]:
    """What a recipe's reward may be called as well: short, or published where the embedded one is meant."""
    import rewards as table

    full = [published for published, toy in table.TOYS.items() if toy == name]
    return [*full, *(short for short, long in table.SHORT.items() if long in (name, *full))]


def load_own_plugins(run: Run) -> None:
    """Those of its manifest.

    Raises:
        PluginFault: one is gone, changed, or lies in the run's own folder.
    """
    for plugin in plugins_of(run.folder, [Path(known.path) for known in loaded_plugins()]):
        if plugin.doubt:
            raise PluginFault(
                f"the plug-in {plugin.path} {plugin.doubt}",
                remedy=f'read it, then: load_recipe("quickstart", plugins=["{plugin.path}"])',
            )
        load_plugins([plugin.path])


def _new_folder(
    loaded: LoadedRecipe, out: Path | str | None, make: Callable[[LoadedRecipe, Path | None], Path]
) -> Path:
    try:
        return make(loaded, None if out is None else Path(out))
    except FileExistsError as fault:
        raise RecipeFault([f"out={fault}: is not empty; give a new folder, or resume=True"], what="call") from fault
