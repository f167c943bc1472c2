"""Options of drawing, checked before anything heavy is imported; `sdo sample`, `sdo eval` and `sdo prune` share them.

In the groups that `sdo eval` takes, None is "as in the recipe"; those called ``Plain…`` have values instead.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import typer

from sdo_cli.device import PRECISIONS
from sdo_cli.errors import RecipeFault
from sdo_cli.models.lora_stack import joined
from sdo_cli.recipe.rollout_check import check_timesteps
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, SOLVERS, STOCHASTIC

# settings of drawing where there is no recipe
BARE = Recipe("embedded", [], PromptSource(lines=["-"]))
# what is called otherwise in a recipe
KEYS = {"precision": "mixed_precision", "steps": "num_inference_steps", "guidance": "guidance_scale"}

MODEL = typer.Option("--model", "-m", help="embedded, a diffusers folder, a .safetensors checkpoint, a hub id.")
T5 = typer.Option(help="The third text encoder of SD 3.")
PRECISION = typer.Option(help=f"What the model computes in: {', '.join(PRECISIONS)}.")
STEPS = typer.Option("--steps", help="num_inference_steps.")
GUIDANCE = typer.Option("--guidance", help="guidance_scale; 1 or less is without.")
SOLVER = typer.Option(help=f"{AUTO}, or {', '.join(SOLVERS)}.")
ETA = typer.Option(help="DDIM's and TCD's noise, 0 to 1.")
TIMESTEPS = typer.Option(help="Noise levels of the steps, as 999,749,499,249; in place of --steps.")
NEGATIVE = typer.Option(help="What guidance moves away from.")
PIXELS = typer.Option(help="Pixels; the model's own by default.")
BATCH_SIZE = typer.Option(help="Images at a time.")


@dataclass(frozen=True)
class WeightOptions:
    model: Annotated[str | None, MODEL] = None
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None
    variant: Annotated[str | None, typer.Option(help="fp16: weight files of that name.")] = None


@dataclass(frozen=True)
class PlainWeights(WeightOptions):
    model: Annotated[str, MODEL] = "embedded"


@dataclass(frozen=True)
class ModelOptions(WeightOptions):
    vae: Annotated[str | None, typer.Option(help="Another VAE: a folder or hub id.")] = None
    text_encoders: Annotated[str | None, typer.Option(help="For a file without: a pipeline's folder.")] = None
    t5: Annotated[bool | None, T5] = None
    prediction_type: Annotated[str | None, typer.Option(help="epsilon or v_prediction, if the config is wrong.")] = None
    rescale_betas_zero_snr: Annotated[bool | None, typer.Option(help="Zero terminal SNR, likewise.")] = None
    timestep_spacing: Annotated[str | None, typer.Option(help="leading, trailing or linspace, likewise.")] = None
    precision: Annotated[str | None, PRECISION] = None


@dataclass(frozen=True)
class PlainModel(ModelOptions):
    model: Annotated[str, MODEL] = "embedded"
    t5: Annotated[bool, T5] = True
    precision: Annotated[str, PRECISION] = "no"


@dataclass(frozen=True)
class LoraOptions:
    lora: Annotated[list[str] | None, typer.Option(help="A run folder or LoRA file, FILE:0.8; again for more.")] = None
    lora_scale: Annotated[float, typer.Option(help="Weight of all of them; 0 is without.")] = 1.0

    @property
    def stack(self) -> str | None:
        """All of them as one word.

        Raises:
            EnvironmentFault: one that may be several, or whose weight is no number.
        """
        return joined(self.lora) if self.lora else None


@dataclass(frozen=True)
class SolverOptions:
    steps: Annotated[int | None, STEPS] = None
    guidance: Annotated[float | None, GUIDANCE] = None
    solver: Annotated[str | None, SOLVER] = None


@dataclass(frozen=True)
class PlainSolver(SolverOptions):
    steps: Annotated[int, STEPS] = 50
    guidance: Annotated[float, GUIDANCE] = 7.5
    solver: Annotated[str, SOLVER] = AUTO


@dataclass(frozen=True)
class PictureOptions:
    negative_prompt: Annotated[str | None, NEGATIVE] = None
    height: Annotated[int | None, PIXELS] = None
    width: Annotated[int | None, PIXELS] = None


@dataclass(frozen=True)
class PlainPicture(PictureOptions):
    negative_prompt: Annotated[str, NEGATIVE] = ""


def with_timesteps(asked: Recipe, text: str | None, steps: int | None) -> Recipe:
    """The settings with the timesteps of ``--timesteps``, as many as there are steps.

    Args:
        steps: of ``--steps``, where it was typed.

    Raises:
        RecipeFault: no list of falling whole numbers, or another number of them.
    """
    if text is None:
        if steps is not None and asked.timesteps is not None and steps != len(asked.timesteps):
            # those of a recipe are for its own number
            return replace(asked, timesteps=None)
        return asked
    try:
        timesteps = [int(word) for word in text.split(",")]
    except ValueError:
        text = f"--timesteps: {text!r} is no list of whole numbers; write 999,749"
        raise RecipeFault([text], what="command line") from None
    wrong: list[str] = []
    check_timesteps(timesteps, steps, (), lambda key, said: wrong.append(f"--{key[-1]}: {said}"))
    if wrong:
        raise RecipeFault(wrong, what="command line")
    return replace(asked, timesteps=timesteps, num_inference_steps=len(timesteps))


def laid_over(
    recipe: Recipe, weights: WeightOptions, solver: SolverOptions, picture: PictureOptions, **more: Any
) -> Recipe:
    """The recipe with everything that was given, also ``more`` options by name; what is None stays as it is."""
    groups = (weights, solver, picture)
    given = {field.name: getattr(group, field.name) for group in groups for field in fields(group)} | more
    return replace(recipe, **{KEYS.get(name, name): value for name, value in given.items() if value is not None})


def drawing_problems(asked: Recipe, *, lora_scales: list[float], batch_size: int, seed: int, count: int) -> list[str]:
    """Everything that is wrong with the settings of drawing, each line with its option.

    Args:
        count: of images, whose seeds follow each other.
    """
    solver, height, width = asked.solver, asked.height, asked.width
    limits: list[tuple[str, float, float, float]] = [
        ("steps", asked.num_inference_steps, 1, MOST_STEPS),
        ("batch-size", batch_size, 1, 10**6),
        ("guidance", asked.guidance_scale, 0, 1000),
        ("eta", asked.eta, 0, 1),
        ("seed", seed, 0, 2**63 - 1 - count),
        *(("lora-scale", scale, -1000, 1000) for scale in lora_scales),
    ]
    wrong = [
        f"--{name}: must be between {least} and {most}, not {value}"
        for name, value, least, most in limits
        # also catches NaN
        if not least <= value <= most
    ]
    if asked.prediction_type not in (None, "epsilon", "v_prediction"):
        wrong.append(f"--prediction-type: {asked.prediction_type!r} is neither epsilon nor v_prediction")
    if asked.timestep_spacing not in (None, "leading", "trailing", "linspace"):
        wrong.append(f"--timestep-spacing: {asked.timestep_spacing!r} is not one of leading, trailing, linspace")
    if asked.mixed_precision not in PRECISIONS:
        wrong.append(f"--precision: {asked.mixed_precision!r} is not one of {', '.join(PRECISIONS)}")
    if solver not in (AUTO, *SOLVERS):
        wrong.append(f"--solver: unknown solver {solver!r}; choose one of {', '.join((AUTO, *SOLVERS))}")
    elif asked.eta > 0 and solver not in (AUTO, *STOCHASTIC):
        wrong.append(f"--eta: is the noise of {', '.join(STOCHASTIC)}; solver {solver} takes none")
    for side, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 8 or pixels % 8):
            wrong.append(f"--{side}: must be a multiple of 8, not {pixels}")
    return wrong
