"""What `sdo optimize` is told, typed and checked; imports no torch."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

import rewards as reward_table
from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.rules import RULES, known_names, option_problem, resolve
from sdo_cli.recipe.check import Problem, check_prompts, check_reward, wrong_option
from sdo_cli.recipe.document import read_document
from sdo_cli.recipe.load import read_recipe
from sdo_cli.recipe.prompts import read_prompts, shipped_folder
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.recipe.typed import BROKEN, Reader, suggestion
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, SOLVERS, STOCHASTIC, calls_of

VARIABLES = ("latent", "embedding", "embedding-per-step", "guidance", "guidance-per-step", "noise")
# what stands before the colon of an objective that is no reward
KINDS = ("style", "text", "image", "classifier")
# of each kind, and the type of its value; a pair of numbers is a schedule from the first step to the last
_CLIP: dict[str, type] = {"model": str, "pretrained": str}
KIND_OPTIONS: dict[str, dict[str, type]] = {
    "style": {**_CLIP, "layer": int},
    "text": {**_CLIP, "alpha": list, "augmentations": int},
    "image": {"loss": str},
}
# rules whose reward sees an x0-prediction part-way, or re-noised repeats
LOOK_ELSEWHERE = ("refl", "draft-lv")
# x_i = (x_{i+1} - b e(x_i)) / a can be solved for one step at a time only
ONE_STEP = (AUTO, "ddim", "euler", "flow-euler")


@dataclass(frozen=True)
class ObjectiveSpec:
    """A reward's name, ``style:FILE``, ``text:WORDS``, ``image:FILE`` or ``classifier:REWARD``; a bare name stands for
    the whole. A negative ``weight`` lowers a reward.
    """

    SHORTHAND: ClassVar[str] = "name"

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """One of ``KINDS``, or ``reward``."""
        word, colon, _ = self.name.partition(":")
        return word if colon and word in KINDS else "reward"

    @property
    def value(self) -> str:
        """What stands after the colon; of a reward, its name."""
        return self.name if self.kind == "reward" else self.name.partition(":")[2]

    @property
    def reward(self) -> RewardSpec | None:
        """The reward that scores it, if one does."""
        return RewardSpec(self.value, options=self.options) if self.kind in ("reward", "classifier") else None


@dataclass(frozen=True)
class Steering:
    """One optimisation of single images; fields of sampling are named as in fine-tuning recipes.

    ``start`` is the solver step whose latent is optimised (0 the initial noise); what comes before is drawn once.
    ``images`` are pictures to begin from: one for all, or one per prompt; they are inverted with
    ``inversion_iterations`` fixed-point iterations a step at ``inversion_guidance`` (default: guidance_scale).
    ``variables`` of ``VARIABLES``. ``learning_rates`` are for single variables, instead of ``learning_rate``.
    ``norm_prior`` is the weight of ReNO's log-likelihood of the latent's norm, ``renormalise`` gives latents their
    first norm after every step (DOODL). ``patience`` steps without a better image end it, 0 never.
    ``measures`` are rewards that only measure before and after. ``seed``: image j starts from
    ``manual_seed(seed + j)``, as in `sdo sample`.
    """

    model: str
    objectives: list[ObjectiveSpec]
    prompts: PromptSource
    description: str = ""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    t5: bool = True
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    reward_precision: Literal["no", "fp16", "bf16"] = "no"
    vae_checkpointing: bool = False
    gradient_checkpointing: bool = False
    output_dir: str = "steered"

    solver: str = AUTO
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_images: int = 1
    batch_size: int = 4

    images: list[str] = field(default_factory=list)
    inversion_guidance: float | None = None
    inversion_iterations: int = 10

    start: int = 0
    variables: list[str] = field(default_factory=lambda: ["latent"])
    rule: str = "sdo"
    rule_options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = True
    steps: int = 100
    optimizer: Literal["adam", "adamw", "sgd", "sgd-norm"] = "adam"
    learning_rate: float = 0.01
    learning_rates: dict[str, float] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.9
    norm_prior: float = 0.0
    renormalise: bool = False
    patience: int = 0
    measures: list[RewardSpec] = field(default_factory=list)
    strip: int = 8

    @property
    def rate_of(self) -> dict[str, float]:
        return {name: self.learning_rates.get(name, self.learning_rate) for name in self.variables}

    def as_recipe(self) -> Recipe:
        """Model, sampling and rewards as the rest of sdo reads them."""
        specs = [
            spec.reward or RewardSpec("clip-score", options=_clip_options(spec))
            for spec in self.objectives
            if spec.kind != "image"
        ]
        return Recipe(
            model=self.model,
            rewards=[*specs, *self.measures],
            prompts=self.prompts,
            revision=self.revision,
            variant=self.variant,
            vae=self.vae,
            t5=self.t5,
            prediction_type=self.prediction_type,
            mixed_precision=self.mixed_precision,
            reward_precision=self.reward_precision,
            solver=self.solver,
            eta=self.eta,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
        )


def _clip_options(spec: ObjectiveSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.options.items() if key in _CLIP}


@dataclass(frozen=True)
class LoadedSteering:
    """Attributes:
    name: of the recipe, ``optimize`` without one.
    text: of the recipe as given.
    folder: where files named in it are looked for first.
    prompts: one per entry, before ``num_images``.
    given: what other commands take for it.
    """

    spec: Steering
    name: str
    text: str
    folder: Path
    prompts: list[str]
    given: str = "RECIPE.yaml   (write it with --dry-run > RECIPE.yaml)"

    def resolved(self) -> dict[str, Any]:
        return asdict(self.spec)


def steering_folder() -> Path:
    return shipped_folder() / "optimize"


def shipped_steerings() -> list[str]:
    return sorted(path.stem for path in steering_folder().glob("*.yaml"))


def find_steering(name: str) -> Path:
    """A path, or the name of a shipped recipe of `sdo optimize`; raises RecipeFault for neither."""
    path, shipped = Path(name).expanduser(), steering_folder() / f"{name}.yaml"
    if path.is_file() or shipped.is_file():
        return path if path.is_file() else shipped
    raise RecipeFault([f"--recipe {name}: no such file or shipped recipe; {suggestion(name, shipped_steerings())}"])


def load_steering(recipe: str | None, options: dict[str, Any], overrides: list[str]) -> LoadedSteering:
    """Recipe (the embedded model without one), then ``key=value``, then the options of the command line.

    Raises:
        RecipeFault: with every problem found, each with its origin and remedy.
    """
    path = find_steering(recipe) if recipe is not None else None
    text = read_recipe(path) if path else "model: embedded\n"
    document = read_document(text, str(path) if path else "command line", overrides)
    if document.unreadable:
        raise RecipeFault(document.problems)
    for name, value in options.items():
        document.tree[name] = value
        document.origins = {key: origin for key, origin in document.origins.items() if key[:1] != (name,)}
        document.origins[(name,)] = "command line"
    reader = Reader(document)
    spec = reader.read(document.tree, Steering, ())
    folder = path.parent if path else Path()
    if spec is not BROKEN:
        spec = _with_found_files(spec, folder)
        check_steering(spec, folder, reader.follow_up)
    if document.problems:
        raise RecipeFault(document.problems)
    prompts, more = read_prompts(spec.prompts, folder), {"given": recipe} if recipe else {}
    return LoadedSteering(spec, path.stem if path else "optimize", text, folder, prompts, **more)


def is_steering(name: str) -> bool:
    """Whether a name or path is a recipe of `sdo optimize`: those have objectives."""
    path = Path(name).expanduser()
    if not path.is_file():
        return name in shipped_steerings()
    try:
        tree = yaml.safe_load(read_recipe(path))
    except yaml.YAMLError:
        return False
    return isinstance(tree, dict) and "objectives" in tree


def _with_found_files(spec: Steering, beside: Path) -> Steering:
    """Pictures beside the recipe, as given, or shipped, by their path."""

    def found(name: str) -> str:
        places = [beside / name, Path(name).expanduser(), steering_folder() / name]
        return str(next((place for place in places if place.is_file()), places[1]))

    objectives = [
        replace(item, name=f"{item.kind}:{found(item.value)}") if item.kind in ("style", "image") else item
        for item in spec.objectives
    ]
    return replace(spec, objectives=objectives, images=[found(name) for name in spec.images])


def check_steering(spec: Steering, beside: Path, problem: Problem) -> None:
    """Report everything that is wrong with well-typed settings."""
    _check_numbers(spec, problem)
    _check_variables(spec, problem)
    _check_rule(spec, problem)
    prompts = check_prompts(spec.prompts, ("prompts",), beside, problem)
    if spec.images:
        for index, name in enumerate(spec.images):
            if not Path(name).is_file():
                problem(("images", str(index)), f"no picture {name}; give the path of a PNG, JPEG or WebP file")
        if prompts and len(spec.images) not in (1, len(prompts)):
            problem(
                ("images",), f"there are {len(spec.images)} for {len(prompts)} prompts; give one, or one per prompt"
            )
        if spec.num_images > 1:
            problem(("num_images",), "a picture is inverted to one latent, whatever the seed; write 1")
        if spec.solver not in ONE_STEP:
            problem(("solver",), f"pictures are inverted with {', '.join(ONE_STEP)}; {spec.solver} has no single steps")
        if spec.eta > 0:
            problem(("eta",), "pictures are inverted without injected noise; write 0")
    if not spec.objectives:
        problem(("objectives",), f"is empty; name a reward, or {', '.join(kind + ':…' for kind in KINDS)}")
    for index, item in enumerate(spec.objectives):
        _check_objective(item, ("objectives", str(index)), problem)
    for index, measure in enumerate(spec.measures):
        check_reward(measure, ("measures", str(index)), problem)
    _check_names(spec, problem)


def _check_names(spec: Steering, problem: Problem) -> None:
    """Results are kept by name."""
    named = [(("objectives", str(i), "name"), item.name) for i, item in enumerate(spec.objectives)]
    named += [(("measures", str(i), "name"), item.name) for i, item in enumerate(spec.measures)]
    seen: set[str] = set()
    for key, name in named:
        if (full := reward_table.full_name(name)) in seen:
            problem(key, f"{name} stands there twice, and results are told apart by name; give it once")
        seen.add(full)


def _check_numbers(spec: Steering, problem: Problem) -> None:
    limits: list[tuple[str, float, float]] = [
        ("steps", 1, 10**6),
        ("num_inference_steps", 1, MOST_STEPS),
        ("num_images", 1, 10**6),
        ("batch_size", 1, 10**6),
        ("inversion_iterations", 1, 1000),
        ("patience", 0, 10**6),
        ("strip", 0, 100),
        ("seed", 0, 2**63 - 1),
        ("eta", 0, 1),
        ("guidance_scale", -1000, 1000),
        ("norm_prior", 0, 1e6),
        ("adam_beta1", 0, 0.999999),
        ("adam_beta2", 0, 0.999999),
        ("start", 0, spec.num_inference_steps - 1),
    ]
    for name, low, high in limits:
        # also catches NaN
        if not low <= getattr(spec, name) <= high:
            problem((name,), f"must be between {low} and {high}, not {getattr(spec, name)}")
    if spec.inversion_guidance is not None and not -1000 <= spec.inversion_guidance <= 1000:
        problem(("inversion_guidance",), f"must be between -1000 and 1000, not {spec.inversion_guidance}")
    for name, value in (("learning_rate", spec.learning_rate), *spec.learning_rates.items()):
        if not 0 < value < math.inf:
            problem(("learning_rate" if name == "learning_rate" else "learning_rates",), f"{name}: must be more than 0")
    if spec.solver not in (AUTO, *SOLVERS):
        problem(("solver",), f"unknown solver {spec.solver!r}; {suggestion(spec.solver, [AUTO, *SOLVERS])}")
    elif spec.eta > 0 and spec.solver not in (AUTO, *STOCHASTIC):
        problem(("eta",), f"is the noise of {', '.join(STOCHASTIC)}; solver {spec.solver} takes none, write 0")
    for side in ("height", "width"):
        if (pixels := getattr(spec, side)) is not None and (pixels < 8 or pixels % 8):
            problem((side,), f"must be a multiple of 8, not {pixels}")


def _check_variables(spec: Steering, problem: Problem) -> None:
    if not spec.variables:
        problem(("variables",), f"is empty; choose from {', '.join(VARIABLES)}")
    for name in dict.fromkeys(spec.variables):
        if name not in VARIABLES:
            problem(("variables",), f"unknown variable {name!r}; {suggestion(name, list(VARIABLES))}")
        elif name.endswith("-per-step") and name.removesuffix("-per-step") in spec.variables:
            problem(("variables",), f"{name} and {name.removesuffix('-per-step')} exclude each other; take one out")
    if "noise" in spec.variables and spec.eta == 0:
        problem(("variables",), "noise is injected only with eta above 0; set eta, or take noise out")
    if spec.guidance_scale == 1 and any(name.startswith("guidance") for name in spec.variables):
        problem(
            ("guidance_scale",), "1 computes no unconditional branch; start guidance at another value, such as 1.01"
        )
    for name in spec.learning_rates:
        if name not in spec.variables:
            problem(("learning_rates",), f"{name} is not among the variables {', '.join(spec.variables)}")
    for name in ("norm_prior", "renormalise"):
        if getattr(spec, name) and not {"latent", "noise"} & set(spec.variables):
            problem((name,), "is about latents and injected noise, and neither is a variable; take it out")
    if spec.norm_prior and "latent" in spec.variables and spec.start > 0:
        problem(("norm_prior",), "a latent part-way is no Gaussian; use renormalise, or start at 0")


def _check_rule(spec: Steering, problem: Problem) -> None:
    if not resolve(spec.rule):
        problem(("rule",), f"unknown gradient rule {spec.rule!r}; {suggestion(spec.rule, known_names())}")
        return
    wrong = {name: text for name, value in spec.rule_options.items() if (text := wrong_option(name, value, spec.rule))}
    for name, text in wrong.items():
        problem(("rule_options", name), text)
    calls = calls_of(spec.solver, max(1, spec.num_inference_steps - spec.start))
    if not wrong and (text := option_problem(spec.rule, spec.rule_options, calls)):
        problem(("rule_options",), text)
    if spec.rule in LOOK_ELSEWHERE or (spec.rule == "drtune" and spec.rule_options.get("early_stop", 0.4)):
        why = "early_stop: 0" if spec.rule == "drtune" else "sdo, draft-k or full"
        problem(("rule",), f"{spec.rule} looks at predictions of the image, and steps are compared by it; take {why}")
    embedding = any(name.startswith("embedding") for name in spec.variables)
    if spec.rule == "sdo" and not embedding and set(spec.rule_options) - {"as_epsilon"}:
        problem(("rule_options",), "without an embedding only the first call counts, which sdo takes by itself")
    if RULES[spec.rule].latents_only and embedding:
        problem(("rule",), f"{spec.rule} calls no network backward, which an embedding needs; choose another")


def _check_objective(item: ObjectiveSpec, key: tuple[str, ...], problem: Problem) -> None:
    if item.weight == 0 or not math.isfinite(item.weight):
        problem((*key, "weight"), f"must be a number other than 0, not {item.weight}")
    if item.reward is not None:
        check_reward(item.reward, key, problem)
        full = reward_table.full_name(item.value)
        if reward_table.resolve(full) and reward_table.is_measure_only(full):
            problem((*key, "name"), f"{item.value} only measures, nothing is optimised by it; name it in measures")
        return
    if not item.value.strip():
        problem((*key, "name"), f"{item.kind}: needs what it aims at, like {item.kind}:{_EXAMPLES[item.kind]}")
    elif item.kind in ("style", "image") and not Path(item.value).is_file():
        problem((*key, "name"), f"no picture {item.value}; give the path of a PNG, JPEG or WebP file")
    for name, value in item.options.items():
        known = KIND_OPTIONS[item.kind]
        if name not in known:
            problem((*key, "options", name), f"unknown option; {suggestion(name, list(known))}")
        elif text := _wrong_value(item.kind, name, value):
            problem((*key, "options", name), text)
    if "embedded:judge" in item.options.values():
        problem((*key, "options"), "the judge only measures, nothing is optimised by it; use another model")


_EXAMPLES = {"style": "picture.png", "text": "a smiling face", "image": "target.png", "classifier": "my-reward"}


def _wrong_value(kind: str, name: str, value: Any) -> str | None:
    if name == "alpha":
        pair = value if isinstance(value, list) else [value]
        fits = len(pair) in (1, 2) and all(type(v) in (int, float) and 0 <= v <= 1 for v in pair)
        return None if fits else f"must be a number between 0 and 1, or two for a schedule, not {value!r}"
    if name == "loss":
        return None if value in ("l1", "l2") else f"must be l1 or l2, not {value!r}"
    wanted = KIND_OPTIONS[kind][name]
    if type(value) is not wanted:
        return f"must be {'a whole number' if wanted is int else 'text'}, not {value!r}"
    least = 0 if name == "augmentations" else 1
    if isinstance(value, int) and not least <= value <= 1000:
        return f"must be between {least} and 1000, not {value}"
    return None
