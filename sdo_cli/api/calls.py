"""The commands as functions."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdo_cli.api.given import Changes, Progress, as_command, judges_of, loras_of, names_of, overrides, prompt_set, stamp
from sdo_cli.api.objects import unknown_objects
from sdo_cli.api.progress import reporter_of
from sdo_cli.api.results import Comparison, Evaluation, Run, Sample, Steered, opened
from sdo_cli.api.train import load_own_plugins
from sdo_cli.errors import RecipeFault
from sdo_cli.runs.read import RECIPE


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

    words = loras_of(lora)
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
    prompts: str | Path | Iterable[str] | None = None,
    *,
    loras: "str | Path | Run | Sequence[str | Path | Run]" = (),
    lora_scales: Sequence[float] = (1.0,),
    lora_from_steps: Sequence[int] = (0,),
    base: bool = True,
    images: Sequence[Path | str] = (),
    rewards: Any = None,
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
    distance: str | Sequence[str] = (),
    lpips_weights: Path | str | None = None,
    judges: Mapping[str, str] | Sequence[str] = (),
    judge_question: str | None = None,
    judge_batch: int | None = None,
    judge_timeout: float = 600.0,
    judge_retries: int = 2,
    judge_workers: int = 2,
    scores: Sequence[Path | str] = (),
    select_by: str | None = None,
    out: Path | str | None = None,
    progress: Progress = False,
) -> Evaluation:
    """Draw a prompt set with and without LoRAs, score the pictures, say what differs, as `sdo eval` does.

    Args:
        prompts: a prompt set's name or file, or prompts; default the held-out ones of the first run's recipe.
        loras: each a variant; ``run.all_checkpoints`` stands for all of a run's.
        lora_scales: every LoRA at each of them.
        lora_from_steps: and from each of these steps on, the base before it.
        base: also draw without a LoRA, to compare with.
        images: score these folders instead of drawing.
        rewards: names and objects; default those of the run, else clip and aesthetic. Objects a run was trained on have
            to be given again in another session.
        recipe, model, steps, guidance, solver: in place of the run's.
        seeds, seed: images per prompt; another number, other noise.
        limit, skip: only so many prompts, and not the first so many.
        embedding: also diversity over seeds and distance from the base.
        distance: also both by ``"lpips"``, ``"lpips-vgg"`` …; ``lpips_weights`` is the network's file.
        judges: outside this process, by name: ``{"hpsv3": "http://127.0.0.1:8000/score"}``, or as ``--judge`` has them.
            They only measure. ``judge_question`` and what follows it: as the options of these names.
        scores: tables of scores made elsewhere.
        select_by: the measure that chooses a scale or checkpoint; default the first.
        out: its folder, default ``evals/<prompts>-<time>``; one that holds this evaluation takes more of both.
    """
    from sdo_cli.cli.drawing import BARE, ModelOptions, PictureOptions, SolverOptions
    from sdo_cli.cli.evaluate_job import asked_for, needs_plugins, starting_recipe
    from sdo_cli.cli.evaluate_options import (
        MeasureOptions,
        NoiseOptions,
        PromptOptions,
        RewardOptions,
        VariantOptions,
    )
    from sdo_cli.cli.from_run import laid_over_run
    from sdo_cli.cli.judge_options import JudgeOptions
    from sdo_cli.evaluation.run import evaluate as run

    measures = MeasureOptions(
        embedding=embedding,
        distance=[distance] if isinstance(distance, str) else list(distance),
        lpips_weights=None if lpips_weights is None else Path(lpips_weights),
        select_by=select_by,
    )
    asking = (judge_question, judge_batch, judge_timeout, judge_retries, judge_workers)
    outside = JudgeOptions(judges_of(judges), *asking, [Path(path) for path in scores])
    late = None if tuple(lora_from_steps) == (0,) else ",".join(map(str, lora_from_steps))
    scales = ",".join(f"{s:g}" for s in lora_scales)
    variants = VariantOptions(loras_of(loras), scales, base, [Path(p) for p in images], late)
    start = starting_recipe(recipe, model, variants.loras)
    named = None if rewards is None else ",".join(names_of(rewards))
    if start is not None and start.run is not None and needs_plugins(RewardOptions(named), start):
        load_own_plugins(Run(start.run))
        if rewards is None and (gone := unknown_objects(start.loaded.recipe)):
            text = f"rewards: {', '.join(gone)} of the run was an object: give it again, evaluate(…, rewards=[…])"
            raise RecipeFault([text], what="call")
    groups = (ModelOptions(model=model), SolverOptions(steps, guidance, solver), PictureOptions())
    laid, _ = laid_over_run(start.loaded.recipe if start else BARE, None, groups)
    with prompt_set(prompts) as read:
        asked = asked_for(
            laid,
            start.loaded if start else None,
            prompts=PromptOptions(read, None, limit, skip),
            rewards=RewardOptions(named, None),
            variants=variants,
            noise=NoiseOptions(seeds, seed),
            measures=measures,
            judges=outside,
            skip_plans=[],
            steps_given=steps is not None or start is not None,
            batch_size=batch_size,
            fixed_model=bool(recipe or model),
        )
    job, _ = asked.job()
    folder = Path(out) if out is not None else Path("evals") / f"{job.prompts.name}-{stamp()}"
    with as_command(["report", str(folder)]), reporter_of(progress) as reporter:
        run(
            job,
            folder,
            reporter,
            batch_size=batch_size,
            distances=measures.kinds,
            lpips_weights=measures.lpips_weights,
            outside=asked.outside,
        )
    return Evaluation(folder)


def compare(
    *folders: "str | Path | Run | Evaluation",
    anyway: bool = False,
    select_by: str | None = None,
    out: Path | str | None = None,
) -> Comparison:
    """Evaluations picture by picture, or finished runs by the scores they keep, to the first.

    Args:
        anyway: also when settings differ.
        select_by: the measure said first.
        out: of evaluations the folder, default ``comparisons/<time>``; of runs nothing is written.
    """
    import rewards as table

    if len(folders) < 2:
        raise RecipeFault(["give two runs, or two evaluations"], what="call")

    places = [item.folder if isinstance(item, Run | Evaluation) else Path(item) for item in folders]
    are_runs = [(place / RECIPE).is_file() for place in places]
    if any(are_runs) and (out is not None or not all(are_runs)):
        text = "runs are compared with runs, and nothing is written (no out); or draw all anew: evaluate(loras=[…])"
        raise RecipeFault([text], what="call")
    if all(are_runs):
        from sdo_cli.runs.compare import compare_runs

        return Comparison(compare_runs(places, anyway=anyway))
    from sdo_cli.evaluation.compare import compare_folders

    folder = Path(out) if out is not None else Path("comparisons") / stamp()
    chosen = table.full_name(select_by) if select_by else None
    with as_command(["compare", *map(str, places)]):
        return Comparison(compare_folders(places, folder, anyway=anyway, select_by=chosen), folder)


def optimize(
    recipe: str | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    objectives: Sequence[str | Mapping[str, Any]] | None = None,
    lora: "str | Path | Run | None" = None,
    changes: Changes = (),
    out: Path | str | None = None,
    progress: Progress = False,
    **more: Any,
) -> Steered:
    """Steer single pictures: their latent, prompt embedding, guidance or noise, as `sdo optimize` does.

    Args:
        recipe: a file, or a shipped one: ``style``.
        prompts: what is drawn; with a run's LoRA by default the run's first held-out ones.
        objectives: ``"clip"``, ``"text:{prompt} at night"``, ``"style:picture.png"``, or mappings with a weight.
        lora: a run, folder or file; without a recipe a run also says the model and how it draws.
        changes, more: other keys, as in a recipe of `sdo optimize`.
    """
    from sdo_cli.cli.optimize import from_run
    from sdo_cli.recipe.steering import load_steering
    from sdo_cli.steering.run import optimize as run

    given: dict[str, Any] = {}
    if prompts is not None:
        given["prompts"] = {"lines": [prompts] if isinstance(prompts, str) else list(prompts)}
    if objectives is not None:
        given["objectives"] = [{"name": o} if isinstance(o, str) else dict(o) for o in objectives]
    if lora is not None:
        given["lora"] = str(lora)
    changed = overrides(changes, more)
    own = from_run(given, changed)[0] if recipe is None else {}
    loaded = load_steering(recipe, own | given, changed)
    folder = Path(out) if out is not None else Path(loaded.spec.output_dir) / f"{loaded.name}-{stamp()}"
    if folder.exists() and any(folder.iterdir()):
        raise RecipeFault([f"out={folder}: is not empty; give another folder"], what="call")
    with as_command(["optimize", "--recipe", str(folder / "resolved.yaml")]), reporter_of(progress) as reporter:
        return Steered(folder, run(loaded, folder, reporter))


def export(
    lora: "str | Path | Run",
    form: str = "kohya",
    *,
    out: Path | str | None = None,
    model: str | None = None,
    lora_scale: float = 1.0,
    precision: str = "no",
) -> Path:
    """Write a LoRA for another program, as `sdo export` does.

    Args:
        lora: a run, ``run.at(20)``, a folder or a file.
        form: ``kohya`` (ComfyUI, A1111), ``peft``, ``diffusers``, ``merged`` (a pipeline), ``checkpoint`` (one file).
        lora_scale: of ``merged`` and ``checkpoint``; in the others the program that loads them sets the strength.

    Returns:
        The file or folder.
    """
    from sdo_cli.cli.export import problems_of
    from sdo_cli.exporting.export import ExportJob, default_out
    from sdo_cli.exporting.export import export as run
    from sdo_cli.models.load import ModelSource

    source = Path(str(lora))
    target = Path(out) if out is not None else default_out(source, form)
    if wrong := problems_of(form, target, None, lora_scale, precision):
        raise RecipeFault([line.removeprefix("--") for line in wrong], what="call")
    run(ExportJob(source, ModelSource(model) if model else None, None, lora_scale, precision), form, target)
    return target
