"""From the options of `sdo eval` to a job: every problem is collected, heavy imports come late."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdo_cli.cli.drawing import drawing_problems
from sdo_cli.cli.evaluate_options import (
    DEFAULT_REWARDS,
    MeasureOptions,
    NoiseOptions,
    PromptOptions,
    RewardOptions,
    VariantOptions,
    from_steps_of,
    lora_problem,
    scales_of,
)
from sdo_cli.cli.from_run import start_from
from sdo_cli.cli.judge_options import JudgeOptions
from sdo_cli.device import PRECISIONS
from sdo_cli.errors import RecipeFault
from sdo_cli.judges.spec import NOTHING, Outside
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.sampling.solvers import AUTO
from sdo_cli.scoring.measure_names import BETWEEN_PICTURES

if TYPE_CHECKING:
    from sdo_cli.evaluation.job import Job, Prompts


@dataclass(frozen=True)
class Asked:
    """Everything that makes an evaluation what it is, without a fault.

    Attributes:
        settings: of drawing, and the rewards' precision.
        start: the recipe these come from.
        from_steps: where each LoRA comes in.
        plans: fingerprints of skip plans by file.
    """

    settings: Recipe
    start: LoadedRecipe | None
    prompts: "Prompts | None"
    variants: VariantOptions
    scales: list[float]
    noise: NoiseOptions
    plans: dict[str, str]
    rewards: dict[str, RewardSpec]
    embedding: bool
    select_by: str
    limit: int | None = None
    notes: tuple[str, ...] = ()
    outside: Outside = NOTHING
    from_steps: tuple[int, ...] = (0,)

    def job(self) -> "tuple[Job, list[str]]":
        """And what is to be said of its prompts and of the folders it scores."""
        from sdo_cli.drawing.draw import draw_settings
        from sdo_cli.evaluation.evaluation import folder_variants
        from sdo_cli.evaluation.job import Job, Settings, variants_of
        from sdo_cli.models.load import source_of

        asked, start, loras, prompts, settings = self.settings, self.start, self.variants.loras, self.prompts, None
        notes = list(self.notes)
        trained = [spec.name for spec in _as_evaluated(start.recipe)] if start and loras else []
        if self.variants.folders:
            variants, prompts, said = folder_variants(self.variants.folders, prompts, self.limit)
            notes += said
        else:
            assert prompts is not None
            source, draw, noise = source_of(asked), draw_settings(asked), self.noise
            settings = Settings(source, draw, asked.mixed_precision, noise.seeds, noise.seed, prompts.fingerprint)
            variants = variants_of(
                loras, self.scales, base=self.variants.base, plans=self.plans, from_steps=self.from_steps
            )
        precision = asked.reward_precision
        job = Job(prompts, settings, variants, self.rewards, precision, self.embedding, self.select_by, trained)
        return replace(job, judges=self.outside.judges), notes


def _as_evaluated(recipe: Recipe) -> "list[RewardSpec]":
    """A recipe's trained rewards by the names their scores have here."""
    import rewards as table
    from sdo_cli.weights.needs import reward_options

    return [replace(s, name=table.by_its_name(s.name, reward_options(s, recipe))[0]) for s in recipe.rewards]


def asked_for(
    settings: Recipe,
    start: LoadedRecipe | None,
    *,
    prompts: PromptOptions,
    rewards: RewardOptions,
    variants: VariantOptions,
    noise: NoiseOptions,
    measures: MeasureOptions,
    skip_plans: list[Path],
    steps_given: bool,
    batch_size: int,
    fixed_model: bool,
    judges: JudgeOptions | None = None,
) -> Asked:
    """What the options ask for.

    Args:
        steps_given: skip plans have to fit the number of steps.
        fixed_model: by --recipe or --model, which say nothing of images that are there.

    Raises:
        RecipeFault: everything that is wrong with them.
    """
    loras, folders = variants.loras, variants.folders
    if folders and skip_plans:
        raise RecipeFault(["--skip-plan: is for drawing; --images scores what is there"], what="command line")
    wrong = [] if noise.seeds >= 1 else [f"--seeds: must be at least 1, not {noise.seeds}"]
    if prompts.limit is not None and prompts.limit < 1:
        wrong.append(f"--limit: must be at least 1, not {prompts.limit}")
    if prompts.skip < 0:
        wrong.append(f"--skip: must not be negative, not {prompts.skip}")
    if prompts.skip and folders:
        wrong.append("--skip: is for drawing; --images scores what is there")
    if not loras and not folders and not variants.base:
        wrong.append("--no-base: leaves nothing to draw; give --lora")
    scales = scales_of(variants.lora_scale, wrong)
    from_steps = from_steps_of(variants, settings.num_inference_steps, wrong, plans=bool(skip_plans))
    plans, settings = with_plans(skip_plans, settings, steps_given, wrong)
    if folders and (loras or fixed_model):
        wrong.append("--images: scores what is there; --lora, --recipe and --model are for drawing")
    wrong += measures.problems()
    wrong += drawing_problems(settings, lora_scales=scales, batch_size=batch_size, seed=noise.seed, count=1)
    if settings.reward_precision not in PRECISIONS:
        wrong.append(f"--reward-precision: {settings.reward_precision!r} is not one of {', '.join(PRECISIONS)}")
    wrong += [problem for path in loras if (problem := lora_problem(path))]
    specs = reward_specs(rewards, start, settings, measures.embedding, wrong, made_elsewhere=bool(folders))
    outside = (judges or JudgeOptions()).outside(_own_names(specs), wrong)
    chosen = chosen_measure(measures.select_by, specs, wrong, outside)
    notes: list[str] = []
    found = find_prompts(prompts, start, bool(folders), wrong, notes)
    if wrong:
        raise RecipeFault(wrong, what="command line")
    embedding, limit = measures.embedding, prompts.limit
    return Asked(
        settings,
        start,
        found,
        variants,
        scales,
        noise,
        plans,
        specs,
        embedding,
        chosen,
        limit,
        tuple(notes),
        outside,
        tuple(from_steps),
    )


def _own_names(specs: dict[str, RewardSpec]) -> set[str]:
    import rewards as table

    return {*table.known_names(), *specs, *BETWEEN_PICTURES}


@dataclass(frozen=True)
class Start:
    """Attributes:
    loaded: the recipe that settings come from.
    run: the folder it is of, if it is a run's.
    notes: what is to be said of it.
    """

    loaded: LoadedRecipe
    run: Path | None = None
    notes: tuple[str, ...] = ()


def starting_recipe(recipe: str | None, model: str | None, loras: list[str]) -> Start | None:
    """Settings to start from: the recipe given, else that of the first run among the LoRAs."""
    if recipe is not None:
        return Start(load_recipe(recipe))
    if (found := start_from(loras, model)) is None:
        return None
    first, *others = found.notes
    return Start(
        found.loaded,
        found.folder,
        (
            first.replace("model and sampling", "model, sampling").replace(
                "sampling as", "sampling, prompts and rewards as"
            ),
            *others,
        ),
    )


def needs_plugins(given: RewardOptions, start: Start) -> bool:
    """Whether a reward that is to be measured is known only to the plug-ins of the run."""
    import rewards as table

    own = [spec.name for spec in (*start.loaded.recipe.rewards, *start.loaded.recipe.validation.rewards)]
    wanted = own if given.rewards is None else [name.strip() for name in given.rewards.split(",")]
    return any(name in own and not table.resolve(table.full_name(name)) for name in wanted)


def reward_specs(
    given: RewardOptions,
    start: LoadedRecipe | None,
    asked: Recipe,
    embedding: bool,
    wrong: list[str],
    *,
    made_elsewhere: bool = False,
) -> dict[str, RewardSpec]:
    """By full name, with every option. Where the embedded model draws, its own rewards are meant; of pictures that were
    made elsewhere the published ones. The embedded ones stand under names of their own."""
    import rewards as table
    from sdo_cli.recipe.reward_check import check_reward
    from sdo_cli.weights.needs import reward_options

    own = [*start.recipe.rewards, *start.recipe.validation.rewards] if start else []
    of_recipe = {table.full_name(spec.name): spec.options for spec in reversed(own)}
    if given.rewards is None:
        wanted = [spec.name for spec in own] or DEFAULT_REWARDS.split(",")
    else:
        wanted = [name.strip() for name in given.rewards.split(",") if name.strip()]
    options = options_by_reward(given.option or [], wrong)
    if embedding and "clip-embedded" not in wanted:
        # its model embeds the images
        wanted.append("clip-score")
    full = list(dict.fromkeys(table.full_name(name) for name in wanted))
    wrong += [f"--option: {name} is not among the rewards {', '.join(full)}" for name in options if name not in full]
    specs = {}
    for name in full:
        spec = RewardSpec(name, options={**of_recipe.get(name, {}), **options.get(name, {})})
        check_reward(
            spec, (), lambda key, text: wrong.append(f"--{'option' if 'options' in key else 'rewards'}: {text}")
        )
        if table.resolve(name):
            filled = spec.options if made_elsewhere else reward_options(spec, asked)
            known, kept = table.by_its_name(name, filled)
            specs[known] = replace(spec, name=known, options=kept)
    return specs


def options_by_reward(texts: list[str], wrong: list[str]) -> dict[str, dict[str, Any]]:
    """Of REWARD.KEY=VALUE, by the reward's full name."""
    import rewards as table

    given: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        # names may hold dots: hps-v2.1.checkpoint
        name, dot, part = key.rpartition(".")
        if not equals or not dot:
            wrong.append(f"--option {text}: is not REWARD.KEY=VALUE")
            continue
        given.setdefault(table.full_name(name), {})[part] = _parsed(value)
    return given


def _parsed(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def chosen_measure(
    asked: str | None, specs: dict[str, RewardSpec], wrong: list[str], outside: Outside | None = None
) -> str:
    """The measure scales are chosen by: the one asked for, else the first that may select."""
    import rewards as table

    may = [name for name in specs if not table.is_measure_only(name)]
    if asked is None:
        return may[0] if may else ""
    full = table.full_name(asked)
    full = full if full in specs else table.TOYS.get(full, full)
    if outside is not None and asked in outside.judges:
        wrong.append(f"--select-by: {asked} only measures, nothing is chosen by a judge")
    elif full not in specs:
        wrong.append(f"--select-by: {asked} is not among the rewards {', '.join(specs)}")
    elif full not in may:
        wrong.append(f"--select-by: {asked} only measures, nothing is chosen by it; take one of {', '.join(may)}")
    return full


def find_prompts(
    given: PromptOptions, start: LoadedRecipe | None, optional: bool, wrong: list[str], notes: list[str]
) -> "Prompts | None":
    """Those asked for, the recipe's held-out ones, or none; ``notes`` gets what their file leaves out."""
    from sdo_cli.evaluation.job import EvalPrompt, Prompts
    from sdo_cli.prompt_sets.read import read_prompt_set

    # pictures that are there are paired with the whole set before it is cut
    first, limit = (0, None) if optional else (given.skip, given.limit and given.skip + given.limit)
    if given.prompts is not None:
        try:
            found = read_prompt_set(given.prompts, column=given.column)
        except RecipeFault as fault:
            wrong += [f"--prompts: {problem}" for problem in fault.problems]
            return None
        except ValueError as fault:
            wrong.append(f"--prompts: {fault}")
            return None
        notes += found.notes
        return Prompts(
            found.name,
            found.source,
            [EvalPrompt(p.text, p.category, p.names, p.picture) for p in found.prompts][first:limit],
        )
    if start is not None and start.recipe.validation.prompts != PromptSource():
        lines = start.prompts(start.recipe.validation.prompts)[: start.recipe.validation.num_prompts]
        return Prompts(
            f"{start.name}-heldout", f"held-out prompts of {start.given}", [EvalPrompt(p) for p in lines][first:limit]
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
    if asked.timesteps is not None:
        wrong.append("--skip-plan: was made for steps of its own; leave --timesteps out")
    for path in dict.fromkeys(paths):
        try:
            plan = load_plan(path)
        except EnvironmentFault as fault:
            wrong.append(f"--skip-plan: {fault.message}")
            continue
        found[str(path)] = plan.fingerprint
        if asked.solver == AUTO:
            # the model's own may be another than the plan's
            asked = replace(asked, solver=plan.made_for.solver)
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
