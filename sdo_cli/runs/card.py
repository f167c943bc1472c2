"""What a run leaves for people to read: the reward curve and the model card."""

import json
from pathlib import Path

from sdo_cli.drawing.draw import draw_settings, solver_of
from sdo_cli.files import write_atomic
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource, locate, plain_options, source_of, text_parts
from sdo_cli.plugins import loaded_plugins
from sdo_cli.recipe.load import LoadedRecipe, shipped_descriptions
from sdo_cli.recipe.schema import Recipe
from sdo_cli.records.step import StepResult
from sdo_cli.runs.read import PIPELINE
from sdo_cli.runs.summary import RunSummary
from sdo_cli.sampling.solvers import SOLVERS, settings_of
from sdo_cli.sampling.timesteps import first_order
from sdo_cli.weights.needs import needs_of


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of the last ``width`` values, those of skipped steps (NaN) left out."""
    windows = ([v for v in values[max(0, i - width + 1) : i + 1] if v == v] for i in range(len(values)))
    return [sum(window) / len(window) if window else float("nan") for window in windows]


def curve_png(results: list[StepResult], path: Path) -> None:
    """Each trained reward over the steps: single batches pale, their running mean strong."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # later updates on a rollout have its rewards
    results = [result for result in results if result.replay is None or result.replay.update == 1] or results
    names = list(results[0].rewards)
    figure = Figure(figsize=(7, 2.8 * len(names)), layout="constrained")
    steps = [result.step for result in results]
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        values = [result.rewards[name] for result in results]
        axes.plot(steps, values, color="#9db8d9", linewidth=0.8, label="batch mean")
        axes.plot(steps, smooth(values, 10), color="#1f4e8c", label="mean of the last 10")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120))


def gain_table(summary: RunSummary) -> str:
    """Markdown rows: reward, before, after, difference in standard errors."""
    lines = ["| reward | before | after | difference | in standard errors |", "|---|---|---|---|---|"]
    for name, gain in summary.gains.items():
        role = "trained" if name in summary.trained_on else "only measured"
        lines.append(f"| {name} ({role}) | {gain.before} | {gain.after} | {gain.difference} | {gain.times_its_error} |")
    return "\n".join(lines)


def model_card(loaded: LoadedRecipe, family: Family, summary: RunSummary) -> str:
    recipe = loaded.recipe
    plugins = "".join(f" --plugin {plugin.path}" for plugin in loaded_plugins())
    count = next(iter(summary.gains.values())).difference.n if summary.gains else 0
    measured = f"Held-out prompts ({count}), same noise before and after:\n\n{gain_table(summary)}\n" if count else ""
    if summary.guided:
        means = ", ".join(f"{name} {mean:.4f}" for name, mean in summary.guided.items())
        scale = loaded.recipe.validation.base_guidance_scale
        measured += f"\nThe untrained model with guidance {scale:g}: {means}.\n"
    measured += "".join(f"\n{sentence}\n" for sentence in summary.too_few)
    if lower := summary.falls:
        measured += "\n" + "\n".join(f"- **{sentence}**" for sentence in lower) + "\n"
    grid = f"samples/step_{summary.steps:06d}/grid.png"
    picture = f"![the same prompts and noise, before and after]({grid})\n" if (summary.folder / grid).exists() else ""
    return f"""---
base_model: {recipe.model}
library_name: diffusers
tags: [{"lora, " if recipe.train == "lora" else ""}text-to-image, sdo]
---

# {loaded.name}

{description_of(recipe)}

{what_was_trained(recipe)} for `{recipe.model}`, trained for {summary.steps} steps of
{recipe.global_batch()} samples with the gradient rule
`{recipe.gradient.rule}` on {", ".join(summary.trained_on)}.

{measured}
{picture}
```python
{how_to_load(recipe, family, summary.folder)}
```

{for_whom(recipe)}Drawn with {recipe.solver}, {steps_of(recipe)}, guidance {recipe.guidance_scale}.
Again, from this folder: `sdo finetune --recipe resolved.yaml{plugins}`.

{licences(recipe)}"""


def description_of(recipe: Recipe) -> str:
    """The recipe's own; one that ships with sdo is about a recipe, not about what was made of it here."""
    own = " ".join(recipe.description.split())
    if own and own not in (" ".join(text.split()) for text in shipped_descriptions()):
        return recipe.description
    return "*Describe here what it is for* (in a recipe of your own it is the key `description`)."


def what_was_trained(recipe: Recipe) -> str:
    if recipe.train == "full":
        return "All weights of the denoiser"
    where = " (text encoders too)" if recipe.lora.text_encoder else ""
    if recipe.lora.start_from is not None:
        return f"LoRA{where} that goes on from `{recipe.lora.start_from}`"
    return f"LoRA of rank {recipe.lora.rank}{where}"


def for_whom(recipe: Recipe) -> str:
    if recipe.train == "full":
        return ""
    return (
        "The file is diffusers'. ComfyUI and A1111 leave its attention layers or its alphas out: for them"
        " `sdo export . --format kohya`.\n\n"
    )


def steps_of(recipe: Recipe) -> str:
    if recipe.timesteps is None:
        return f"{recipe.num_inference_steps} steps"
    return f"`timesteps={recipe.timesteps}`"


def how_to_load(recipe: Recipe, family: Family, folder: Path) -> str:
    """Lines of Python for plain diffusers."""
    solver = solver_of(family, draw_settings(recipe))
    scheduler = SOLVERS[solver].scheduler
    settings = settings_of(solver, family.scheduler_config) | source_of(recipe).scheduler_changes()
    if recipe.timesteps is not None and solver == "ddim":
        # diffusers' own takes no timesteps
        scheduler, settings = "DPMSolverMultistepScheduler", settings | first_order(family.scheduler_config)
    change = "".join(f", {name}={quoted(value)}" for name, value in settings.items())
    text: dict[str, str] = {}
    after = [f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{change})"]
    if recipe.train == "full":
        place, way, options = str(folder.resolve() / PIPELINE), "from_pretrained", []
    else:
        place = locate(family.source)
        way = "from_single_file" if Path(place).is_file() else "from_pretrained"
        asked = ModelSource(recipe.model, recipe.revision, recipe.variant, t5=recipe.t5)
        options = [f"{name}={quoted(value)}" for name, value in plain_options(asked).items()]
        if recipe.vae is not None:
            options.append(f"vae=AutoencoderKL.from_pretrained({quoted(recipe.vae)})")
        if recipe.text_encoders is not None:
            text, where = text_parts(recipe.text_encoders, t5=recipe.t5), quoted(recipe.text_encoders)
            options += [f"{n}={kind}.from_pretrained({where}, subfolder={quoted(n)})" for n, kind in text.items()]
        after.append(f"pipe.load_lora_weights({quoted(str(folder.resolve()))})")
    wanted = {family.pipeline_class, *(["AutoencoderKL"] if recipe.vae and options else [])}
    home = SOLVERS[solver].module
    classes = sorted(wanted | ({scheduler} if home == "diffusers" else set()))
    first = [f"from diffusers import {', '.join(classes)}", ""]
    if home != "diffusers":
        first.insert(1, f"from {home} import {scheduler}  # diffusers has no such solver")
    if text:
        first.insert(1, f"from transformers import {', '.join(sorted(set(text.values())))}")
    made = f"pipe = {family.pipeline_class}.{way}({', '.join([quoted(place), *options])})"
    return "\n".join([*first, made, *after])


def quoted(value: object) -> str:
    """A Python literal, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def licences(recipe: Recipe) -> str:
    """Whose weights went into the result."""
    rows = [f"- {need.source}: {need.licence or 'see its page'} ({need.what})" for need in needs_of(recipe)]
    return "Licences of the weights used:\n\n" + "\n".join(rows) + "\n" if rows else ""
