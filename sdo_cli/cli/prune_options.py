"""Options of `sdo prune`, checked before torch loads."""

from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import rewards as table
from sdo_cli.cli.drawing import PlainSolver
from sdo_cli.recipe.prompts import read_prompts
from sdo_cli.recipe.reward_check import check_reward
from sdo_cli.recipe.schema import PromptSource, RewardSpec
from sdo_cli.recipe.toys import named

if TYPE_CHECKING:
    from sdo_cli.prune.lessons import SolverSettings
    from sdo_cli.prune.search import SearchSettings
    from sdo_cli.prune.segments import SegmentSettings

METHODS = ("dip-go", "learned-solver", "segments", "uniform", "deepcache", "random", "optimal-steps", "pairwise-steps")
GRIDS = ("optimal-steps", "pairwise-steps", "even", "polynomial")
STARTS = ("fitted", "euler", "ipndm")
# updates, prompts of an update and rate where none is given, of a learned solver
SOLVER_CALLS = [4, 5, 6, 8]
SOLVER_UPDATES, SOLVER_BATCH, SOLVER_RATE = 100, 16, 0.01
# generations, and prompts a candidate is drawn on, of segments
GENERATIONS, SEGMENT_PROMPTS = 12, 8
LIVE_CALLS = 4
GRAINS = ("blocks", "parts")
PRUNERS = ("attention", "table")
GRADIENTS = ("shortcut", "full", "one-step", "l2c")
DISTANCES = ("ssim", "l1", "l2")
# one search serves them all
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
# rate and optimizer: the paper's for its network; a bare table has no weights to share and needs larger steps
RATES = {"attention": (0.1, "sgd"), "table": (0.05, "adam")}
# the paper's optimizer; its penalty of 5e-6 a gate, as a weight of the share that is computed
L2C_RATE, L2C_SPARSITY = (0.01, "adamw"), 0.003
# at the sparsest, every so many of --prompts is kept for measuring
KEPT_FOR_MEASURING = 10


@dataclass(frozen=True)
class PlanOptions:
    """What kind of plans are looked for, and on what."""

    prompts_file: Annotated[
        str | None, typer.Option("--prompts", "-p", help="Prompts to search on: a file, or a shipped list.")
    ] = None
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "dip-go"
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of the network's computation to leave out. Again for more; 0.1 to 0.9."),
    ] = None
    calls: Annotated[
        list[int] | None, typer.Option(help="The same as whole network calls of a picture, 5 say. Again for more.")
    ] = None
    grain: Annotated[str, typer.Option(help=f"{' or '.join(GRAINS)} (residual and attention layers).")] = "blocks"

    def ratios(self, steps: int) -> list[float]:
        """Shares to leave out of a sampler of ``steps`` calls, with two decimals."""
        calls = self.calls or (SOLVER_CALLS if self.method == "learned-solver" and not self.ratio else [])
        # so many calls or a few hundredths of one more: whole ones are counted
        asked = [floor(100 * (1 - count / steps) + 1e-9) / 100 for count in calls if 0 < count < steps]
        return sorted(dict.fromkeys([*(self.ratio or ([] if asked or calls else RATIOS)), *asked]))


@dataclass(frozen=True)
class FullSampler(PlainSolver):
    steps: Annotated[int, typer.Option("--steps", help="num_inference_steps of the full sampler.")] = 50


@dataclass(frozen=True)
class SearchOptions:
    schedule: Annotated[Path | None, typer.Option(help="A plan of chosen steps, whose blocks are pruned too.")] = None
    updates: Annotated[
        int | None,
        typer.Option(
            help=f"Of the gates, 500; of a learned solver, none after --start fitted, else {SOLVER_UPDATES};"
            f" generations of segments, {GENERATIONS}.",
            show_default=False,
        ),
    ] = None
    pruner: Annotated[str, typer.Option(help=f"{' or '.join(PRUNERS)}: what the gates come from.")] = "attention"
    gradients: Annotated[
        str, typer.Option(help=f"{', '.join(GRADIENTS)}: how gates are trained; a solver by the first two.")
    ] = "shortcut"
    live_calls: Annotated[
        int | None, typer.Option(help="Network calls with gradients, shortcut and one-step; 4, of few steps fewer.")
    ] = None
    distance: Annotated[str, typer.Option(help="ssim, l1 or l2, to the full sampler's image.")] = "ssim"
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help=f"Of the gates, by the pruner; of a solver, {SOLVER_RATE}.")
    ] = None
    search_batch: Annotated[
        int | None,
        typer.Option(
            help=f"Prompts of an update, 1, which several processes share out; of a solver, {SOLVER_BATCH}; that a"
            f" candidate of segments is drawn on, {SEGMENT_PROMPTS}.",
            show_default=False,
        ),
    ] = None
    grid: Annotated[str, typer.Option(help=f"Steps that a learned solver starts from: {', '.join(GRIDS)}.")] = (
        "optimal-steps"
    )
    start: Annotated[str, typer.Option(help=f"What a learned solver begins as: {', '.join(STARTS)}.")] = "fitted"
    window: Annotated[int, typer.Option(help="Calls that a step of a learned solver looks back on, 1 to 4.")] = 3
    scales: Annotated[bool, typer.Option(help="A learned solver also learns the noise levels it asks at.")] = True
    guide_calls: Annotated[
        bool, typer.Option(help="A learned solver also learns how much of the guidance each call gets.")
    ] = True
    population: Annotated[int, typer.Option(help="Candidates of a generation of segments.")] = 16
    samples: Annotated[int, typer.Option(help="Pictures of the full sampler that a solver learns from.")] = 256
    sparsity: Annotated[
        float | None,
        typer.Option(help=f"Weight of the computation in the loss: 1, or {L2C_SPARSITY} of l2c.", show_default=False),
    ] = None
    scores: Annotated[
        Path | None, typer.Option(help="Folder of an earlier search: other ratios of it, without searching.")
    ] = None

    def live(self, steps: int) -> int:
        """Network calls with gradients of a sampler of ``steps``: fewer than there are gates for."""
        gated = steps // 2 if self.gradients == "l2c" else steps - 1
        return self.live_calls if self.live_calls is not None else max(1, min(LIVE_CALLS, gated))

    def settings(self, steps: int) -> "SearchSettings":
        from sdo_cli.prune.search import SearchSettings

        updates, batch = self.updates or 500, self.search_batch or 1
        rate, optimizer = RATES[self.pruner]
        sparsity = 1.0
        if self.gradients == "l2c":
            rate, optimizer, sparsity = *L2C_RATE, L2C_SPARSITY
        return SearchSettings(
            pruner="table" if self.gradients == "l2c" else self.pruner,
            gradients=self.gradients,
            distance=self.distance,
            updates=updates,
            batch=batch,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            optimizer=optimizer,
            sparsity=sparsity if self.sparsity is None else self.sparsity,
            live_calls=self.live(steps),
        )

    def solver_settings(self) -> "SolverSettings":
        from sdo_cli.prune.lessons import SolverSettings

        return SolverSettings(
            gradients=self.gradients,
            window=self.window,
            scales=self.scales,
            guidance=self.guide_calls,
            grid=self.grid,
            start=self.start,
            # fitted steps are good as they are, and shortcut gradients did not better them
            updates=self.updates if self.updates is not None else 0 if self.start == "fitted" else SOLVER_UPDATES,
            samples=self.samples,
            batch=self.search_batch or SOLVER_BATCH,
            learning_rate=self.learning_rate or SOLVER_RATE,
        )

    def segment_settings(self) -> "SegmentSettings":
        from sdo_cli.prune.segments import SegmentSettings

        return SegmentSettings(
            self.updates or GENERATIONS, self.population, self.search_batch or SEGMENT_PROMPTS, self.distance
        )


@dataclass(frozen=True)
class MeasureOptions:
    measure_on: Annotated[
        str | None, typer.Option(help="Prompts to measure on; by default some of --prompts are kept for it.")
    ] = None
    num_prompts: Annotated[int, typer.Option(help="Prompts to measure on, at most; 0 measures nothing.")] = 32
    reward: Annotated[list[str] | None, typer.Option(help="Also measured. Again for more.")] = None
    controls: Annotated[bool, typer.Option(help="Also samplers with as much computation, at three ratios.")] = True
    rounds: Annotated[int, typer.Option(help="Of timing.")] = 3
    batch_size: Annotated[int, typer.Option(help="Images at a time when measuring.")] = 16


def problems(plan: PlanOptions, search: SearchOptions, measure: MeasureOptions, *, steps: int) -> list[str]:
    """Everything that is wrong with them."""
    choices = [
        ("method", plan.method, METHODS),
        ("grain", plan.grain, GRAINS),
        ("pruner", search.pruner, PRUNERS),
        ("gradients", search.gradients, GRADIENTS),
        ("distance", search.distance, DISTANCES),
    ]
    learns = plan.method == "learned-solver"
    if learns:
        choices += [("grid", search.grid, GRIDS), ("start", search.start, STARTS)]
    given = {"updates": search.updates, "search-batch": search.search_batch}
    numbers = {name: number for name, number in given.items() if number is not None}
    if learns and search.updates == 0:
        # what it begins as is measured
        numbers.pop("updates")
    live = search.live(steps)
    numbers |= {"live-calls": live, "rounds": measure.rounds, "population": search.population}
    ratios = plan.ratios(steps) if steps > 0 else plan.ratio or []
    wrong = [f"--{name}: {given!r} is not one of {', '.join(of)}" for name, given, of in choices if given not in of]
    wrong += [f"--ratio: must be at least 0 and below 1, not {r:g}" for r in ratios if not 0 <= r < 1]
    wrong += [f"--ratio: {r:g} has more than two decimals" for r in ratios if 0 <= r < 1 and round(r, 2) != r]
    wrong += [f"--{name}: must be at least 1, not {number}" for name, number in numbers.items() if number < 1]
    if live >= max(2, steps):
        wrong.append(f"--live-calls: {live} of {steps} steps; the first is always whole, so fewer")
    if measure.num_prompts < 0 or measure.num_prompts == 1:
        wrong.append(f"--num-prompts: an interval needs 2 or more, and 0 measures nothing; not {measure.num_prompts}")
    if search.learning_rate is not None and not 0 < search.learning_rate < float("inf"):
        wrong.append(f"--lr: must be above 0, not {search.learning_rate}")
    if search.sparsity is not None and not 0 <= search.sparsity < float("inf"):
        wrong.append(f"--sparsity: must be 0 or more, not {search.sparsity}")
    wrong += [f"--calls: must be from 1 to {steps - 1}, not {n}" for n in plan.calls or () if not 0 < n < steps]
    if learns and search.gradients in ("one-step", "l2c"):
        wrong.append(f"--gradients: {search.gradients} is for gates; a solver is learned by shortcut or full")
    if search.gradients == "l2c" and plan.method == "dip-go" and live > max(1, steps // 2):
        wrong.append(
            f"--live-calls: l2c has gates at every other call, {steps // 2} of {steps} steps; that many or fewer"
        )
    if learns and not 1 <= search.window <= 4:
        wrong.append(f"--window: must be 1 to 4, not {search.window}")
    if learns and search.samples < 8:
        wrong.append(f"--samples: a quarter of them is held back; 8 or more, not {search.samples}")
    if learns and search.schedule is not None:
        wrong.append("--schedule: a solver is learned from --grid; leave it out")
    if steps < 2:
        wrong.append(f"--steps: there is nothing to skip in {steps}; 2 or more")
    return wrong


def file_problems(plan: PlanOptions, search: SearchOptions) -> list[str]:
    files = {"scores": search.scores, "schedule": search.schedule}
    wrong = [f"--{n} {path}: there is no such file" for n, path in files.items() if path and not path.exists()]
    if search.scores is not None and plan.method != "dip-go":
        wrong.append(f"--scores: are of a search; --method {plan.method} makes none")
    return wrong


def reward_specs(names: list[str], model: str, wrong: list[str]) -> list[RewardSpec]:
    """Rewards to measure with; an embedded model goes with embedded ones."""
    specs = []
    for name in dict.fromkeys(names):
        spec = RewardSpec(name)
        check_reward(spec, (), lambda key, text: wrong.append(f"--reward: {text}"))
        if table.resolve(name):
            reward = named(RewardSpec(table.full_name(name)), model)
            specs += [] if reward in specs else [reward]
    return specs


def search_prompts(name: str | None, wrong: list[str]) -> list[str]:
    if name is None:
        wrong.append(
            "--prompts: is missing; name a file of prompts, one a line, or a shipped list (`sdo prompts list`)"
        )
        return []
    return _read(name, "prompts", wrong)


def _read(name: str, option: str, wrong: list[str]) -> list[str]:
    try:
        return list(dict.fromkeys(read_prompts(PromptSource(file=name), None)))
    except ValueError as fault:
        wrong.append(f"--{option}: {fault}")
        return []


def measured_prompts(
    prompts: list[str], measure_on: str | None, most: int, wrong: list[str]
) -> tuple[list[str], list[str]]:
    """Prompts to measure on, and those left to search with: never the same."""
    if most == 0:
        return [], prompts
    if measure_on is None:
        # spread over the list, and never more than half of it
        held = prompts[:: max(2, min(KEPT_FOR_MEASURING, len(prompts) // most))][:most]
    else:
        held = _read(measure_on, "measure-on", wrong)[:most]
    left = [prompt for prompt in prompts if prompt not in set(held)]
    if prompts and not wrong and (len(held) < 2 or not left):
        wrong.append(
            f"--prompts: {len(prompts)} are too few to search on some and measure on two others; "
            "add some, or --num-prompts 0"
        )
    return held, left
