"""What `sdo sample` lays side by side: its lists, its axes, and what is wrong with them; imports nothing heavy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Annotated

import typer

from sdo_cli.cli.drawing import SOLVER, LoraOptions, PlainSolver, drawing_problems
from sdo_cli.drawing.axes import AXES, VARIANTS, Layout, Values, laid_out
from sdo_cli.models.lora_paths import written_out
from sdo_cli.models.lora_stack import number_of
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.solvers import AUTO

# pictures drawn together: in a grid each is what is drawn alone, to the byte
TOGETHER, ALONE = 16, 1
WHOLE = re.compile(r"[+-]?[0-9]+")

LORA = typer.Option(
    help="A run folder or LoRA file, FILE:0.8. Again for more: all at once; with --grid side by side, and A+B is both."
)
SCALE = typer.Option(help="Weight of all of them; 0 is without. With --grid also a list: 0,0.5,1.")
BATCH = typer.Option(
    help=f"Images at a time: {TOGETHER}, in a grid {ALONE}, so that each is what is drawn alone, to the last bit."
)
SIDE = f"one of {', '.join((*AXES, VARIANTS))} (LoRAs and scales in one)"


@dataclass(frozen=True)
class ListedLoras:
    lora: Annotated[list[str] | None, LORA] = None
    lora_scale: Annotated[str, SCALE] = "1"
    lora_from_step: Annotated[
        int | None, typer.Option(metavar="K", help="The base model draws the first K steps, the LoRA comes in then.")
    ] = None
    lora_scale_end: Annotated[
        float | None,
        typer.Option(help="Its weight at the last step; --lora-scale is that of its first, linear between."),
    ] = None

    @property
    def at_once(self) -> LoraOptions:
        return LoraOptions(self.lora)

    def timing_problems(self, steps: int, *, alone: bool, plan: bool) -> list[str]:
        """What is wrong with a LoRA that is not the same at every step.

        Args:
            alone: no grid and no --seeds.
            plan: whether a skip plan leaves calls out.
        """
        given = {"lora-from-step": self.lora_from_step, "lora-scale-end": self.lora_scale_end}
        found: list[str] = []
        for name in (name for name, value in given.items() if value is not None):
            if not self.lora:
                found.append(f"--{name}: there is no --lora")
            if not alone:
                found.append(f"--{name}: not with --grid or --seeds; draw each in a folder of its own")
            if plan:
                found.append(f"--{name}: not with --skip-plan, which leaves whole calls out")
        if self.lora_from_step is not None and not 0 <= self.lora_from_step <= steps:
            found.append(f"--lora-from-step: must be between 0 and the {steps} steps, not {self.lora_from_step}")
        if self.lora_scale_end is not None and not -100 <= self.lora_scale_end <= 100:
            found.append(f"--lora-scale-end: must be a number like 0.5, not {self.lora_scale_end}")
        return found

    def note(self, *, side_by_side: bool) -> list[str]:
        """What several of them mean here."""
        if self.lora is None or len(self.lora) < 2:
            return []
        if side_by_side:
            return [f"{len(self.lora)} --lora, side by side; one word A+B draws both at once"]
        return [f"{len(self.lora)} --lora, all at once in every picture; --grid lays them side by side"]


@dataclass(frozen=True)
class ListedSolver:
    """Steps and guidance, of which --grid takes several: ``10,20,50``."""

    steps: Annotated[str, typer.Option(help="num_inference_steps; with --grid also a list.")] = "50"
    guidance: Annotated[str, typer.Option(help="guidance_scale, likewise; 1 or less is without.")] = "7.5"
    solver: Annotated[str, SOLVER] = AUTO


@dataclass(frozen=True)
class GridOptions:
    rows: Annotated[str | None, typer.Option(metavar="AXIS", help=f"Of the grid: {SIDE}.")] = None
    columns: Annotated[str | None, typer.Option(metavar="AXIS", help="Likewise.")] = None
    seeds: Annotated[
        str | None, typer.Option(metavar="K", help="Every prompt from the same K seeds: seed, seed + 1, …")
    ] = None


@dataclass(frozen=True)
class Listed:
    """The numbers of the options that may be lists, the first of each where nothing is a grid."""

    scales: list[float]
    steps: list[int]
    guidance: list[float]

    def first(self, solver: str) -> PlainSolver:
        return PlainSolver(self.steps[0], self.guidance[0], solver)

    def problems(self, asked: Recipe, *, batch_size: int, seed: int, count: int) -> list[str]:
        """Of these settings with any of the numbers, each once."""
        found: list[str] = []
        for steps, guidance in zip_longest(self.steps, self.guidance):
            one = replace(
                asked,
                num_inference_steps=asked.num_inference_steps if steps is None or asked.timesteps else steps,
                guidance_scale=asked.guidance_scale if guidance is None else guidance,
            )
            found += drawing_problems(one, lora_scales=self.scales, batch_size=batch_size, seed=seed, count=count)
        return list(dict.fromkeys(found))

    def fixed_by(self, options: dict[str, object]) -> list[str]:
        """What is wrong with several numbers of steps beside an option that says them."""
        given = [name for name, value in options.items() if value is not None and len(self.steps) > 1]
        return [f"--steps: a list, but --{name} says the steps; leave one of the two out" for name in given]


def as_in(recipe: Recipe, solver: ListedSolver, typed: Sequence[str]) -> ListedSolver:
    """With a run's own numbers where none was typed."""
    own = {"steps": str(recipe.num_inference_steps), "guidance": f"{recipe.guidance_scale:f}", "solver": recipe.solver}
    return replace(solver, **{name: value for name, value in own.items() if name not in typed})


def listed(loras: ListedLoras, solver: ListedSolver, *, grid: bool, wrong: list[str]) -> Listed:
    """Plain decimal numbers; ``wrong`` takes what is none, and lists without a grid."""
    found = Listed(
        _numbers("lora-scale", loras.lora_scale, 1.0, "0.8", wrong),
        [int(n) for n in _numbers("steps", solver.steps, 50, "20", wrong, whole=True)],
        _numbers("guidance", solver.guidance, 7.5, "7.5", wrong),
    )
    for name, some in (("lora-scale", found.scales), ("steps", found.steps), ("guidance", found.guidance)):
        if len(some) > 1 and not grid:
            wrong.append(f"--{name}: a list is for --grid; add --grid, or give one number")
    if len(found.scales) > 1 and not loras.lora:
        wrong.append("--lora-scale: a list is of the weights of a LoRA; add --lora")
    return found


def _numbers(
    name: str, text: str, otherwise: float, example: str, wrong: list[str], *, whole: bool = False
) -> list[float]:
    words = [word.strip() for word in text.split(",")]
    numbers = [None if whole and not WHOLE.fullmatch(word) else number_of(word) for word in words]
    good = [number for number in numbers if number is not None]
    if len(good) < len(words):
        kind = "plain whole number" if whole else "plain number"
        bad = words[numbers.index(None)]
        wrong.append(f"--{name}: {bad!r} is no {kind}; write digits, as {example}")
        return [otherwise]
    return list(dict.fromkeys(good))


def seeds_of(
    options: GridOptions, seed: int, num_images: int, *, grid: bool, counted: bool, wrong: list[str]
) -> list[int] | None:
    """The seeds of every prompt; None where image j of all starts from seed + j.

    Args:
        counted: ``--num-images`` was typed; in a grid it says the same.
    """
    if options.seeds is None:
        return list(range(seed, seed + num_images)) if grid else None
    if counted:
        wrong.append("--num-images: --seeds says how many images a prompt has; leave one of the two out")
    if not WHOLE.fullmatch(options.seeds) or not 1 <= int(options.seeds) <= 10**6:
        wrong.append(f"--seeds: must be a whole number between 1 and {10**6}, not {options.seeds}")
        return [seed]
    return list(range(seed, seed + int(options.seeds)))


def values_of(
    prompts: list[str], loras: ListedLoras, numbers: Listed, seeds: list[int], *, side_by_side: bool
) -> Values:
    """Everything that is drawn. Without a grid several LoRAs are one stack.

    Raises:
        EnvironmentFault: as :func:`sdo_cli.models.lora_stack.stack_of`, of a LoRA.
    """
    # RUN@all: each of its checkpoints
    words = written_out(loras.lora or []) if side_by_side else loras.lora or []
    if words and not side_by_side:
        words = [str(loras.at_once.stack)]
    return Values(
        tuple(dict.fromkeys(prompts)),
        tuple(dict.fromkeys(words)),
        tuple(numbers.scales),
        tuple(seeds),
        tuple(numbers.steps),
        tuple(numbers.guidance),
    )


def layout_of(values: Values, options: GridOptions, *, grid: bool, wrong: list[str]) -> Layout | None:
    """Of the sheets; None without ``--grid``."""
    if grid:
        return laid_out(values, options.rows, options.columns, wrong)
    typed = {"rows": options.rows, "columns": options.columns}
    wrong += [f"--{name}: is of the grid; add --grid" for name, axis in typed.items() if axis is not None]
    return None
