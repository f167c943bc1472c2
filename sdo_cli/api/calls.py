"""The commands as functions."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli import provenance
from sdo_cli.api.objects import registered_reward, registered_rule, with_objects
from sdo_cli.api.progress import Told, reporter_of
from sdo_cli.api.results import Comparison, Evaluation, Run, Sample, Steered, opened
from sdo_cli.errors import Interrupted, PluginFault, RecipeFault, Stopped
from sdo_cli.plugins import load_plugins, loaded_plugins
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.load import load_recipe as read_recipe
from sdo_cli.runs.again import check_places, load_run, plugins_of

if TYPE_CHECKING:
    from sdo_cli.records.step import StepResult

Progress = bool | Callable[[Told], None]
Changes = Mapping[str, Any] | Sequence[str]


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
    return read_recipe(str(name), _overrides(changes, more))


def _overrides(changes: Changes, more: Mapping[str, Any]) -> list[str]:
    words = [_word(key, value) for key, value in changes.items()] if isinstance(changes, Mapping) else list(changes)
    return [*words, *(_word(key, value) for key, value in more.items())]


def _word(key: str, value: Any) -> str:
    """``key=value`` as on the command line; JSON is YAML's flow style."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def finetune(
    recipe: LoadedRecipe | Run | str | Path,
    *,
    out: Path | str | None = None,
    rewards: Sequence[Any] = (),
    rule: Callable[..., Any] | None = None,
    resume: bool = False,
    progress: Progress = False,
    on_step: "Callable[[StepResult], None] | None" = None,
) -> Run:
    """Train on the recipe's rewards, as `sdo finetune` does.

    Args:
        recipe: of :func:`load_recipe`, or its name or path; or a :class:`Run`, which goes on as it was. Objects that it
            was trained on are to be given again as ``rewards`` and ``rule``.
        out: the run's folder; default ``<output_dir>/<recipe>-<time>``.
        rewards: objects with ``score(images, prompts) -> [B]``, in place of the recipe's; ``(object, weight)`` for
            other weights than 1. Their name is ``object.name``, or that of their class.
        rule: a function to a plan (docs/plugins.md), in place of the recipe's rule; named like the function.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        progress: True for bars, or a function that gets a :class:`Told` at every sign of progress.
        on_step: gets every optimizer step's figures.

    Returns:
        The run. An interrupted cell leaves a checkpoint, and ``finetune(Run("runs/x"))`` goes on.

    Raises:
        SdoError: bad input, missing weights, a reward without a gradient (before anything is drawn).
        Interrupted: stopped by a signal, and saved.
    """
    if isinstance(recipe, Run):
        loaded, out, resume = _as_it_was(recipe, rewards, rule), recipe.folder, True
    else:
        loaded = with_objects(recipe if isinstance(recipe, LoadedRecipe) else load_recipe(recipe), rewards, rule)
    if resume and out is None:
        raise RecipeFault(
            ["resume=True: goes on in out=FOLDER; name it, or give the run: finetune(Run(…))"], what="call"
        )
    from sdo_cli.exporting.export import kohya_writer
    from sdo_cli.models.load import source_of
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.runs.folder import new_run_folder
    from sdo_cli.training.run import finetune as run

    folder = Path(out) if out is not None and resume else _new_folder(loaded, out, new_run_folder)
    also = kohya_writer(source_of(loaded.recipe), loaded.name) if loaded.recipe.lora.kohya else None
    words = ["finetune", "--recipe", loaded.given, *loaded.overrides, "--out", str(folder)]
    with _as_command(words), reporter_of(progress) as reporter, Stopping(None, reporter.note) as stopping:
        try:
            run(loaded, folder, reporter, resume=resume, stopping=stopping, also=also, on_step=on_step)
        except Stopped as stop:
            what = f"stopped ({stop.reason}); what is done is kept in {folder}/"
            raise Interrupted(what, remedy=f'go on with: finetune(Run("{folder}"))') from None
    return Run(folder)


def _as_it_was(run: Run, rewards: Sequence[Any], rule: Callable[..., Any] | None) -> LoadedRecipe:
    """The recipe of a run, its plug-ins loaded, its objects registered by their names.

    Raises:
        PluginFault: a plug-in that changed, or lies in the run's own folder: load it by hand first.
    """
    for item in rewards:
        registered_reward(item[0] if isinstance(item, tuple) else item)
    if rule is not None:
        registered_rule(rule)
    for plugin in plugins_of(run.folder, [Path(known.path) for known in loaded_plugins()]):
        if plugin.doubt:
            raise PluginFault(
                f"the plug-in {plugin.path} {plugin.doubt}",
                remedy=f'read it, then: load_recipe("quickstart", plugins=["{plugin.path}"])',
            )
        load_plugins([plugin.path])
    loaded = load_run(run.folder)
    check_places(loaded.recipe, run.folder, how="put it there, or go on by the command: sdo finetune --resume")
    return loaded


def _new_folder(
    loaded: LoadedRecipe, out: Path | str | None, make: Callable[[LoadedRecipe, Path | None], Path]
) -> Path:
    try:
        return make(loaded, None if out is None else Path(out))
    except FileExistsError as fault:
        raise RecipeFault([f"out={fault}: is not empty; give a new folder, or resume=True"], what="call") from fault


def sample(
    prompts: str | Sequence[str],
    *,
    lora: "str | Path | Run | Sequence[str | Path | Run] | None" = None,
    lora_scale: float = 1.0,
    model: str | None = None,
    num_images: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    eta: float | None = None,
    timesteps: Sequence[int] | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    precision: str | None = None,
    batch_size: int = 16,
    out: Path | str | None = None,
    progress: Progress = False,
) -> list[Sample]:
    """Draw pictures, prompts outermost, as `sdo sample` does.

    With a run's LoRA everything not given is as in that run; else 50 steps at guidance 7.5.

    Args:
        lora: run, folder, file or several (each at its own weight: ``"a.safetensors:0.8"``).
        seed: picture j starts from ``manual_seed(seed + j)``.
        out: folder to keep the PNG files in; default none are kept.
    """
    from sdo_cli.cli.drawing import (
        BARE,
        ModelOptions,
        PictureOptions,
        SolverOptions,
        drawing_problems,
        with_timesteps,
    )
    from sdo_cli.cli.from_run import laid_over_run, start_from
    from sdo_cli.drawing.draw import draw_settings
    from sdo_cli.drawing.sample import SampleJob, draw_to_folder
    from sdo_cli.models.load import source_of
    from sdo_cli.models.lora_stack import joined

    words = _words(lora)
    start = start_from(words, model)
    plain = replace(BARE, guidance_scale=7.5)
    groups = (
        ModelOptions(model=model, precision=precision),
        SolverOptions(steps, guidance, solver),
        PictureOptions(negative_prompt, height, width),
    )
    asked, _ = laid_over_run(start.loaded.recipe if start else plain, None, groups, eta=eta)
    asked = with_timesteps(asked, None if timesteps is None else ",".join(map(str, timesteps)), steps)
    lines = [prompts] if isinstance(prompts, str) else list(prompts)
    count = len(lines) * num_images
    wrong = drawing_problems(asked, lora_scales=[lora_scale], batch_size=batch_size, seed=seed, count=count)
    if wrong := [*wrong, *([] if lines and num_images > 0 else ["prompts: give at least one, num_images from 1"])]:
        raise RecipeFault([line.removeprefix("--") for line in wrong], what="call")
    stack = joined(words) if words else None
    drawn, settings = source_of(asked), draw_settings(asked)
    job = SampleJob(drawn, stack, lora_scale, lines, num_images, seed, batch_size, settings, asked.mixed_precision)
    place: AbstractContextManager[str] = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with reporter_of(progress) as reporter, place as folder:
        files = draw_to_folder(job, Path(folder), reporter=reporter)
        pictures = [opened(path) for path in files]
    each = [prompt for prompt in lines for _ in range(num_images)]
    return [Sample(image, prompt, seed + j) for j, (image, prompt) in enumerate(zip(pictures, each, strict=True))]


def evaluate(
    prompts: str | None = None,
    *,
    loras: "Sequence[str | Path | Run]" = (),
    lora_scales: Sequence[float] = (1.0,),
    base: bool = True,
    images: Sequence[Path | str] = (),
    rewards: Sequence[str] | None = None,
    recipe: str | None = None,
    model: str | None = None,
    seeds: int = 1,
    seed: int = 0,
    limit: int | None = None,
    skip: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    batch_size: int = 16,
    embedding: bool = True,
    select_by: str | None = None,
    out: Path | str | None = None,
    progress: Progress = False,
) -> Evaluation:
    """Draw a prompt set with and without LoRAs, score the pictures, say what differs, as `sdo eval` does.

    Args:
        prompts: a prompt set's name or file; default the held-out ones of the first run's recipe.
        loras: each a variant; ``run.all_checkpoints`` stands for all of a run's.
        images: score these folders instead of drawing.
        limit, skip: only so many prompts, and not the first so many.
        rewards: names; default those of the run, else clip and aesthetic.
    """
    from sdo_cli.cli.drawing import BARE, ModelOptions, PictureOptions, SolverOptions
    from sdo_cli.cli.evaluate_job import asked_for, starting_recipe
    from sdo_cli.cli.evaluate_options import (
        MeasureOptions,
        NoiseOptions,
        PromptOptions,
        RewardOptions,
        VariantOptions,
    )
    from sdo_cli.cli.from_run import laid_over_run
    from sdo_cli.evaluation.run import evaluate as run

    variants = VariantOptions(_words(loras), ",".join(f"{s:g}" for s in lora_scales), base, [Path(p) for p in images])
    start = starting_recipe(recipe, model, variants.loras)
    groups = (ModelOptions(model=model), SolverOptions(steps, guidance, solver), PictureOptions())
    laid, _ = laid_over_run(start.loaded.recipe if start else BARE, None, groups)
    named = None if rewards is None else ",".join(rewards)
    asked = asked_for(
        laid,
        start.loaded if start else None,
        prompts=PromptOptions(prompts, None, limit, skip),
        rewards=RewardOptions(named, None),
        variants=variants,
        noise=NoiseOptions(seeds, seed),
        measures=MeasureOptions(embedding=embedding, select_by=select_by),
        skip_plans=[],
        steps_given=steps is not None or start is not None,
        batch_size=batch_size,
        fixed_model=bool(recipe or model),
    )
    job, _ = asked.job()
    folder = Path(out) if out is not None else Path("evals") / f"{job.prompts.name}-{_stamp()}"
    with _as_command(["report", str(folder)]), reporter_of(progress) as reporter:
        return Evaluation(folder, run(job, folder, reporter, batch_size=batch_size))


def compare(
    *folders: "str | Path | Run | Evaluation",
    anyway: bool = False,
    select_by: str | None = None,
    out: Path | str | None = None,
) -> Comparison:
    """Evaluations picture by picture, or finished runs by the scores they keep, to the first.

    Args:
        anyway: also when settings differ.
    """
    import rewards as table

    places = [item.folder if isinstance(item, Run | Evaluation) else Path(item) for item in folders]
    if all((place / "resolved.yaml").is_file() for place in places):
        from sdo_cli.runs.compare import compare_runs

        return Comparison(compare_runs(places, anyway=anyway))
    from sdo_cli.evaluation.compare import compare_folders

    folder = Path(out) if out is not None else Path("comparisons") / _stamp()
    chosen = table.full_name(select_by) if select_by else None
    with _as_command(["compare", *map(str, places)]):
        return Comparison(compare_folders(places, folder, anyway=anyway, select_by=chosen), folder)


def optimize(
    recipe: str | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    objectives: Sequence[str | Mapping[str, Any]] | None = None,
    changes: Changes = (),
    out: Path | str | None = None,
    progress: Progress = False,
    **more: Any,
) -> Steered:
    """Steer single pictures: their latent, prompt embedding, guidance or noise, as `sdo optimize` does.

    Args:
        recipe: a file, or a shipped one: ``style``.
        objectives: ``"clip"``, ``"text:{prompt} at night"``, ``"style:picture.png"``, or mappings with a weight.
        changes, more: other keys, as in a recipe of `sdo optimize`.
    """
    from sdo_cli.recipe.steering import load_steering
    from sdo_cli.steering.run import optimize as run

    given: dict[str, Any] = {}
    if prompts is not None:
        given["prompts"] = {"lines": [prompts] if isinstance(prompts, str) else list(prompts)}
    if objectives is not None:
        given["objectives"] = [{"name": o} if isinstance(o, str) else dict(o) for o in objectives]
    loaded = load_steering(recipe, given, _overrides(changes, more))
    folder = Path(out) if out is not None else Path(loaded.spec.output_dir) / f"{loaded.name}-{_stamp()}"
    if folder.exists() and any(folder.iterdir()):
        raise RecipeFault([f"out={folder}: is not empty; give another folder"], what="call")
    with _as_command(["optimize", "--recipe", str(folder / "resolved.yaml")]), reporter_of(progress) as reporter:
        return Steered(folder, run(loaded, folder, reporter))


def _words(loras: Any) -> list[str]:
    """Names of LoRAs as the command line has them."""
    if loras is None:
        return []
    several = [loras] if isinstance(loras, str | Path | Run) else list(loras)
    return [str(one) for one in several]


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


@contextmanager
def _as_command(words: Sequence[str]) -> Iterator[None]:
    """What folders keep as the command that repeats them: this process' own line says nothing of it."""
    with provenance.instead(words):
        yield
