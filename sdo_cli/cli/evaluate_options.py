"""From the options of `sdo eval` to a job: every problem is collected, heavy imports come late."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.runs.read import pipeline_of, recipe_of

if TYPE_CHECKING:
    from sdo_cli.evaluate.job import Job, Prompts

DEFAULT_REWARDS = "clip,aesthetic"
BARE = Recipe("embedded", [], PromptSource(lines=["-"]))


def starting_recipe(recipe: str | None, model: str | None, loras: list[str]) -> tuple[LoadedRecipe | None, str]:
    """Settings to start from: the recipe given, else that of the first run folder; and a line that says so."""
    if recipe is not None:
        return load_recipe(recipe), ""
    if model is None:
        for lora in loras:
            if (own := recipe_of(Path(lora))) is not None:
                return load_recipe(str(own)), f"model, sampling and rewards as in {own}"
    return None, ""


def scales_of(text: str, wrong: list[str]) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        wrong.append(f"--lora-scale: {text!r} is no list of numbers; write 0,0.5,1")
        return [1.0]


def lora_problem(path: str) -> str | None:
    """What is wrong with a LoRA's path, before anything is drawn; a/b may be a hub id."""
    place = Path(path).expanduser()
    if (whole := pipeline_of(place)) is not None:
        return f"--lora {path}: all weights were trained in this run; evaluate it with --model {whole}"
    if place.is_dir() and not any(place.glob("*.safetensors")):
        return f"--lora {path}: holds no LoRA; the run may not be finished (look at its manifest.json)"
    if not place.exists() and (path.count("/") != 1 or path.endswith(".safetensors")):
        return f"--lora {path}: no such file or folder"
    return None


def reward_specs(
    names: str | None,
    options: list[str],
    start: LoadedRecipe | None,
    asked: Recipe,
    embedding: bool,
    wrong: list[str],
) -> dict[str, RewardSpec]:
    """By full name, with every option, the embedded models filled in."""
    import rewards as table
    from sdo_cli.recipe.check import check_reward
    from sdo_cli.weights.needs import reward_options

    own = [*start.recipe.rewards, *start.recipe.validation.rewards] if start else []
    of_recipe = {table.full_name(spec.name): spec.options for spec in reversed(own)}
    if names is None:
        wanted = [spec.name for spec in own] or DEFAULT_REWARDS.split(",")
    else:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
    given: dict[str, dict[str, Any]] = {}
    for text in options:
        key, equals, value = text.partition("=")
        # names may hold dots: hps-v2.1.checkpoint
        name, dot, part = key.rpartition(".")
        if not equals or not dot:
            wrong.append(f"--option {text}: is not REWARD.KEY=VALUE")
            continue
        given.setdefault(table.full_name(name), {})[part] = _parsed(value)
    if embedding:
        # its model embeds the images
        wanted.append("clip-score")
    full = list(dict.fromkeys(table.full_name(name) for name in wanted))
    wrong += [f"--option: {name} is not among the rewards {', '.join(full)}" for name in given if name not in full]
    specs = {}
    for name in full:
        spec = RewardSpec(name, options={**of_recipe.get(name, {}), **given.get(name, {})})
        check_reward(
            spec, (), lambda key, text: wrong.append(f"--{'option' if 'options' in key else 'rewards'}: {text}")
        )
        if table.resolve(name):
            specs[name] = replace(spec, options=reward_options(spec, asked))
    return specs


def _parsed(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def chosen_measure(asked: str | None, names: str | None, specs: dict[str, RewardSpec], wrong: list[str]) -> str:
    """The measure scales are chosen by: the one asked for, else the first that may select."""
    import rewards as table

    may = [name for name in specs if not table.is_measure_only(name)]
    if asked is None:
        return may[0] if may else ""
    full = table.full_name(asked)
    if full not in specs:
        wrong.append(f"--select-by: {asked} is not among the rewards {', '.join(specs)}")
    elif full not in may:
        wrong.append(f"--select-by: {asked} only measures, nothing is chosen by it; take one of {', '.join(may)}")
    return full


def find_prompts(
    name: str | None,
    column: str | None,
    limit: int | None,
    start: LoadedRecipe | None,
    optional: bool,
    wrong: list[str],
) -> "Prompts | None":
    from sdo_cli.evaluate.job import EvalPrompt, Prompts
    from sdo_cli.prompt_sets.read import read_prompt_set

    if name is not None:
        try:
            found = read_prompt_set(name, column=column)
        except RecipeFault as fault:
            wrong += [f"--prompts: {problem}" for problem in fault.problems]
            return None
        except ValueError as fault:
            wrong.append(f"--prompts: {fault}")
            return None
        return Prompts(found.name, found.source, [EvalPrompt(p.text, p.category) for p in found.prompts][:limit])
    if start is not None and start.recipe.validation.prompts != PromptSource():
        lines = start.prompts(start.recipe.validation.prompts)[: start.recipe.validation.num_prompts]
        return Prompts(
            f"{start.name}-heldout", f"held-out prompts of {start.given}", [EvalPrompt(p) for p in lines][:limit]
        )
    if not optional:
        wrong.append(
            "--prompts: is missing; name a set (`sdo prompts list`), a file, or a recipe with held-out prompts"
        )
    return None


def with_plans(paths: list[Path], asked: Recipe, fixed: bool, wrong: list[str]) -> tuple[dict[str, str], Recipe]:
    """Fingerprints of skip plans by file, and the settings that they were made for.

    Args:
        fixed: the steps were asked for, so that plans have to fit them.
    """
    if not paths:
        return {}, asked
    from sdo_cli.errors import EnvironmentFault
    from sdo_cli.skipping.skip_plan import load_plan

    found = {}
    for path in dict.fromkeys(paths):
        try:
            plan = load_plan(path)
        except EnvironmentFault as fault:
            wrong.append(f"--skip-plan: {fault.message}")
            continue
        found[str(path)] = plan.fingerprint
        steps = plan.made_for.num_inference_steps
        if plan.made_for.timesteps is not None:
            continue
        if steps == asked.num_inference_steps:
            fixed = True
            continue
        if fixed:
            wrong.append(f"--skip-plan {path}: was made for {steps} steps, not {asked.num_inference_steps}")
        asked, fixed = replace(asked, num_inference_steps=steps), True
    return found, asked


def make_job(
    asked: Recipe,
    prompts: "Prompts | None",
    loras: list[str],
    scales: list[float],
    base: bool,
    folders: list[Path],
    seeds: int,
    seed: int,
    specs: dict[str, RewardSpec],
    embedding: bool,
    select_by: str,
    start: LoadedRecipe | None,
    plans: dict[str, str] | None = None,
) -> "Job":
    import rewards as table
    from sdo_cli.drawing.draw import draw_settings
    from sdo_cli.evaluate.evaluation import folder_variants
    from sdo_cli.evaluate.job import Job, Settings, variants_of
    from sdo_cli.models.load import source_of

    trained = [table.full_name(spec.name) for spec in start.recipe.rewards] if start and loras else []
    if folders:
        variants, prompts = folder_variants(folders, prompts)
        settings = None
    else:
        assert prompts is not None
        source, draw = source_of(asked), draw_settings(asked)
        settings = Settings(source, draw, asked.mixed_precision, seeds, seed, prompts.fingerprint)
        variants = variants_of(loras, scales, base=base, plans=plans)
    return Job(prompts, settings, variants, specs, asked.reward_precision, embedding, select_by, trained)
