"""What types cannot say of the settings of `sdo optimize`."""

import math
from pathlib import Path
from typing import Any

import rewards as reward_table
from sdo_cli.gradients.rules import RULES, known_names, option_problem, resolve
from sdo_cli.recipe.check import check_prompts, wrong_option
from sdo_cli.recipe.reward_check import check_reward
from sdo_cli.recipe.rollout_check import Problem
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.recipe.steering_schema import (
    KIND_OPTIONS,
    KINDS,
    LOOK_ELSEWHERE,
    ONE_STEP,
    VARIABLES,
    ObjectiveSpec,
    Steering,
)
from sdo_cli.recipe.toys import name_of
from sdo_cli.recipe.typed import suggestion
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, NOISY_SOLVERS, SOLVERS, STOCHASTIC, calls_of

LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 10**6),
    "num_inference_steps": (1, MOST_STEPS),
    "num_images": (1, 10**6),
    "batch_size": (1, 10**6),
    "inversion_iterations": (1, 1000),
    "patience": (0, 10**6),
    "strip": (0, 100),
    "seed": (0, 2**63 - 1),
    "eta": (0, 1),
    "guidance_scale": (-1000, 1000),
    "norm_prior": (0, 1e6),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
}


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
    specs = [RewardSpec(item.name, options=item.options) for item in spec.objectives]
    named = [(("objectives", str(i), "name"), item) for i, item in enumerate(specs)]
    named += [(("measures", str(i), "name"), item) for i, item in enumerate(spec.measures)]
    seen: set[str] = set()
    for key, item in named:
        if (full := name_of(item, spec.model)) in seen:
            problem(key, f"{item.name} stands there twice, and results are told apart by name; give it once")
        seen.add(full)


def _check_numbers(spec: Steering, problem: Problem) -> None:
    for name, (low, high) in (LIMITS | {"start": (0, spec.num_inference_steps - 1)}).items():
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
    if "noise" in spec.variables and spec.eta == 0 and spec.solver not in NOISY_SOLVERS:
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
