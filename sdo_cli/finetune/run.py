"""One fine-tuning job from recipe to run folder."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import rewards
from rewards.base import Reward
from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import draw_settings
from sdo_cli.drawing.pictures import read_image, save_grid, save_image
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.files import alone_in, append_json_line, read_json, without_nan, write_json, write_text
from sdo_cli.finetune.card import curve_png, model_card
from sdo_cli.finetune.checkpoint import Checkpoint, restore, save
from sdo_cli.finetune.loop import Job, StepResult, train
from sdo_cli.finetune.lora import add_lora, train_everything, trainable
from sdo_cli.finetune.objective import WeightedReward
from sdo_cli.finetune.optimizer import Stepper
from sdo_cli.finetune.report import run_report
from sdo_cli.finetune.resume import cut_metrics, find, identity
from sdo_cli.finetune.run_folder import manifest, step_result, write_recipe
from sdo_cli.finetune.stopping import SafePoints, Stopped, Stopping
from sdo_cli.finetune.validate import Validation
from sdo_cli.gradients.outcome import added
from sdo_cli.models.base import Family
from sdo_cli.models.load import load_family, source_of
from sdo_cli.progress import Reporter
from sdo_cli.provenance import now
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.reports.page import write_report
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.scoring.statistics import Gain, paired_gain
from sdo_cli.weights.needs import explaining, reward_options


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to say. ``gains`` are on the held-out prompts, by reward name."""

    folder: Path
    gains: dict[str, Gain]
    trained_on: list[str]
    seconds: dict[str, float]
    steps: int


def prepare(loaded: LoadedRecipe) -> tuple[Job, Validation | None]:
    """Load models and rewards and put the adapter in; nothing is written.

    Prompts are encoded first and the text encoders freed, unless they are trained.
    """
    with explaining(loaded.recipe, loaded.given):
        return _load_all(loaded)


def _load_all(loaded: LoadedRecipe) -> tuple[Job, Validation | None]:
    recipe, device = loaded.recipe, pick_device()
    prompts, held_out = loaded.prompts(recipe.prompts), _held_out(loaded)
    family = _load_family(recipe)
    if recipe.train == "full":
        train_everything(family)
    else:
        add_lora(family, recipe.lora, seed=recipe.seed)
    embed = PromptEmbeddings(family)
    if not recipe.lora.text_encoder:
        embed.prepare([*prompts, *held_out], recipe.negative_prompt, device)
    family.to(device, dtype_of(recipe.mixed_precision), train_all=recipe.train == "full")
    _save_memory(family, recipe)
    trained = [
        WeightedReward(spec.name, _build_reward(spec, recipe, device), spec.weight, spec.loss, spec.target or 0.0)
        for spec in recipe.rewards
    ]
    validation = _prepare_validation(loaded, held_out, trained, embed)
    # looked up after the move: only then are they the tensors the optimizer has to hold
    return Job(recipe, family, trained, prompts, trainable(family), embed), validation


def _held_out(loaded: LoadedRecipe) -> list[str]:
    spec = loaded.recipe.validation
    return [] if spec.prompts == PromptSource() else loaded.prompts(spec.prompts)[: spec.num_prompts]


def _load_family(recipe: Recipe) -> Family:
    # weights that are all trained stay in fp32
    return load_family(source_of(recipe), dtype=dtype_of("no" if recipe.train == "full" else recipe.mixed_precision))


def _save_memory(family: Family, recipe: Recipe) -> None:
    """What is recomputed or cut into tiles so that a step fits."""
    if recipe.gradient_checkpointing or recipe.gradient.checkpointing == "blocks":
        family.denoiser.enable_gradient_checkpointing()
    if recipe.vae_tiling:
        family.vae.enable_tiling()
    if recipe.vae_checkpointing:
        family.checkpoint_vae()


def _build_reward(spec: RewardSpec, recipe: Recipe, device: torch.device) -> Reward:
    """A reward on ``device``, as the recipe means it."""
    reward = build_reward(spec.name, reward_options(spec, recipe), device, dtype_of(recipe.reward_precision))
    if recipe.reward_checkpointing and hasattr(reward, "gradient_checkpointing"):
        reward.gradient_checkpointing()
    return reward


def _prepare_validation(
    loaded: LoadedRecipe, held_out: list[str], trained: list[WeightedReward], embed: PromptEmbeddings
) -> Validation | None:
    if not held_out:
        return None
    recipe, spec = loaded.recipe, loaded.recipe.validation
    known = {item.name: item.reward for item in trained}
    measured = {name: _build_reward(item, recipe, pick_device()) for name, item in only_measured(recipe).items()}
    return Validation(
        prompts=held_out,
        seeds=spec.seeds,
        run_seed=recipe.seed,
        rewards=known | measured,
        settings=draw_settings(recipe),
        batch_size=spec.batch_size,
        embed=embed,
    )


def only_measured(recipe: Recipe) -> dict[str, RewardSpec]:
    """The validation rewards that are not trained on, by a name for each; other options make another reward."""
    trained = [(rewards.full_name(spec.name), spec.options) for spec in recipe.rewards]
    taken = {name for name, _ in trained}
    found = {}
    for spec in recipe.validation.rewards:
        full = rewards.full_name(spec.name)
        if (full, spec.options) in trained:
            continue
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items()) or "published"
        found[f"{spec.name} ({options})" if full in taken else spec.name] = spec
        taken.add(full)
    return found


def finetune(
    loaded: LoadedRecipe,
    folder: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    stopping: Stopping | None = None,
) -> RunSummary:
    """Run the whole job into ``folder``.

    The weights are saved as soon as training ends; card and a manifest with status ``finished`` come last.

    Args:
        resume: go on from the newest complete checkpoint in ``folder``, if there is one.
        stopping: asked at every safe point.

    Raises:
        Stopped: there was a reason to; a checkpoint of the last step is there if any step was taken.
    """
    begin = find(loaded, folder, reporter) if resume else None
    job, validation = prepare(loaded)
    for spec in (*loaded.recipe.rewards, *loaded.recipe.validation.rewards):
        if spec.name in rewards.SHORT:
            reporter.note(f"reward {spec.name}: the newest version, {rewards.full_name(spec.name)}")
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return _run_alone(job, validation, loaded, folder, reporter, begin, stopping or Stopping())


def _run_alone(
    job: Job,
    validation: Validation | None,
    loaded: LoadedRecipe,
    folder: Path,
    reporter: Reporter,
    begin: Checkpoint | None,
    stopping: Stopping,
) -> RunSummary:
    """With a manifest that says how it ended."""
    started, status = now(), "failed"
    if begin is not None:
        started = read_json(folder / "manifest.json").get("started", started)
    write_recipe(loaded, folder, validation.prompts if validation else None)
    write_json(folder / "manifest.json", manifest(loaded, job.family.name, "running", started))
    try:
        summary = _train_and_measure(job, loaded, validation, folder, SafePoints(reporter, stopping), begin)
        status = "finished"
    except (KeyboardInterrupt, Stopped):
        status = "interrupted"
        raise
    finally:
        write_json(folder / "manifest.json", manifest(loaded, job.family.name, status, started))
    return summary


def _train_and_measure(
    job: Job,
    loaded: LoadedRecipe,
    validation: Validation | None,
    folder: Path,
    reporter: SafePoints,
    begin: Checkpoint | None,
) -> RunSummary:
    before, first_grid = _before(job, validation, folder, reporter, resumed=begin is not None)
    stepper = Stepper(job.recipe, job.parameters)
    start = begin.step if begin else 0
    results = [step_result(row) for row in cut_metrics(folder, start)]
    if begin is not None:
        restore(begin, stepper)
    run, last, keep = identity(loaded), job.recipe.max_train_steps, job.recipe.checkpoints_total_limit
    every, grids = job.recipe.checkpointing_steps, job.recipe.validation.grid_steps
    reporter.phase("training", last - start)
    for result in train(job, stepper=stepper, start=start):
        results.append(result)
        append_json_line(folder / "metrics.jsonl", without_nan(asdict(result)))
        if result.skipped:
            reporter.note(f"step {result.step} skipped: a reward or the gradient was not finite")
        if grids and result.step % grids == 0 and result.step < last:
            _grid(job, validation, first_grid, folder, result.step)
        # what came before a skipped step is in the checkpoint before it; weights that make nonsense are in none
        if every and not result.skipped and (result.step % every == 0 or result.step == last):
            save(folder, result.step, stepper, run, keep=keep)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in result.rewards.items())
        try:
            reporter.advance(1, f"{shown}  loss {result.loss:.4f}  |g| {result.grad_norm:.2e}")
        except Stopped:
            save(folder, result.step, stepper, run, keep=keep)
            raise
    seconds = added([result.seconds for result in results])
    # before anything else that could fail
    _save_weights(job, folder)
    after = _measure(job.family, validation, "held-out, after", reporter)
    _grid(job, validation, first_grid, folder, job.recipe.max_train_steps)

    gains = {name: paired_gain(before[name], after[name]) for name in before}
    trained_on = [item.name for item in job.rewards]
    summary = RunSummary(folder, gains, trained_on, seconds, len(results))
    _write_results(job, loaded, validation, summary, results, {"before": before, "after": after})
    return summary


def _before(
    job: Job, validation: Validation | None, folder: Path, reporter: SafePoints, *, resumed: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Held-out scores and pictures of the untrained model; of a resumed run those it began with."""
    kept = folder / "checkpoints" / "before.json"
    if resumed and kept.is_file():
        scores = {name: torch.tensor(rows) for name, rows in read_json(kept).items()}
        pictures = sorted((folder / "samples" / "step_000000").glob("[0-9]*.png"))
        return scores, torch.stack([read_image(path) for path in pictures]) if pictures else None
    before = _measure(job.family, validation, "held-out, before", reporter)
    grid = _grid(job, validation, None, folder, 0)
    if job.recipe.checkpointing_steps:
        write_json(kept, {name: rows.tolist() for name, rows in before.items()})
    return before, grid


def _measure(family: Family, validation: Validation | None, name: str, reporter: Reporter) -> dict[str, Tensor]:
    if validation is None:
        return {}
    reporter.phase(name, len(validation.pairs))
    return validation.measure(family, reporter)


def _grid(job: Job, validation: Validation | None, first: Tensor | None, folder: Path, step: int) -> Tensor | None:
    """Draw the grid prompts; save each alone, and all under the images from before training, and return them."""
    count = min(job.recipe.validation.grid_prompts, len(validation.prompts) if validation else 0)
    if validation is None or count == 0:
        return None
    images = validation.draw(job.family, range(0, count * validation.seeds, validation.seeds))
    rows, labels = ([images], ["before"]) if first is None else ([first, images], ["before", f"step {step}"])
    stage = folder / "samples" / f"step_{step:06d}"
    for index, image in enumerate(images):
        save_image(image, stage / f"{index:05d}.png")
    save_grid(rows, labels, stage / "grid.png", captions=validation.prompts[:count])
    return images


def _write_results(
    job: Job,
    loaded: LoadedRecipe,
    validation: Validation | None,
    summary: RunSummary,
    results: list[StepResult],
    scores: dict[str, dict[str, Tensor]],
) -> None:
    folder = summary.folder
    curve_png(results, folder / "reward_curve.png")
    if validation is not None:
        table = {when: {name: value.tolist() for name, value in rows.items()} for when, rows in scores.items()}
        write_json(folder / "validation.json", {"prompts": validation.prompts, **table})
    write_report(run_report(folder, "finished"), folder / "report.html")
    write_text(folder / "README.md", model_card(loaded, job.family, summary))


def _save_weights(job: Job, folder: Path) -> None:
    if job.recipe.train == "full":
        _save_pipeline(job, folder / "pipeline")
        return
    partial = folder / ".partial-lora"
    job.family.save_lora(partial)
    (partial / "pytorch_lora_weights.safetensors").replace(folder / "pytorch_lora_weights.safetensors")
    shutil.rmtree(partial)


def _save_pipeline(job: Job, folder: Path) -> None:
    """A whole pipeline with the trained denoiser; the parts that were freed are read again."""
    fresh = _load_family(job.recipe)
    fresh.denoiser.load_state_dict(job.family.denoiser.state_dict())
    partial = folder.with_name(".partial-pipeline")
    fresh.pipeline.save_pretrained(partial)
    partial.replace(folder)
