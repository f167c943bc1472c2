"""Learns a multistep solver for a few calls from a sampler with many (DyWeight, arXiv 2603.11607).

The student of :mod:`sdo_cli.prune.student` starts fitted, or as Euler or iPNDM, from the teacher's noise, and its final
latent is drawn towards the teacher's. Where there is guidance, how much of it a call gets is learned too: few calls
want less at first (not in the paper).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdo_cli.drawing.draw import branches
from sdo_cli.drawing.pruned import prediction_of
from sdo_cli.errors import SolverFault
from sdo_cli.prune.lessons import FITTED, Lessons, SolverSettings
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.student import Student, asking, full_gradient, shortcut_gradient
from sdo_cli.sampling.multistep import adams_bashforth, out_of_order
from sdo_cli.sampling.solvers import make_scheduler
from sdo_cli.sampling.timesteps import whole_timesteps
from sdo_cli.seeding import keyed_generator
from sdo_cli.skipping.multistep import Multistep, multistep_of

STARTS = ("fitted", "euler", "ipndm")
GRIDS = ("optimal-steps", "pairwise-steps", "even", "polynomial")
# of the least squares, relative
RIDGE = 1e-4
# of the guidance scale, what a fitted call may get; beyond it gets the scale itself
LEAST, MOST = 0.0, 3.0
# spacing of Karras et al. 2022 (arXiv 2206.00364), equation 5
RHO = 7.0
LOOK_EVERY = 25
# the part of the samples that a derivative by the level is taken of
PART = 4


@dataclass(frozen=True)
class Learned:
    """Attributes:
    timesteps: of the grid, falling.
    begun, error: root mean square distance to the teacher's latents on the samples held back: at first, and now.
    """

    timesteps: tuple[int, ...]
    numbers: Multistep
    begun: float
    error: float


def new_student(setting: Setting, timesteps: tuple[int, ...], wanted: SolverSettings) -> Student:
    """The solver to begin as at these timesteps, to be learned."""
    config = setting.family.scheduler_config
    flow = prediction_of(setting.family) == "flow_prediction"
    start = adams_bashforth(len(timesteps), wanted.window if wanted.start == "ipndm" else 1)
    scheduler: Any = make_scheduler(student_solver(flow), config, len(timesteps), timesteps, start)
    weights = torch.zeros(len(timesteps), min(wanted.window, len(timesteps)), dtype=torch.float64)
    for i, row in enumerate(start.weights):
        weights[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    scales = torch.zeros(len(timesteps), dtype=torch.float64).requires_grad_(wanted.scales)
    moves = torch.zeros_like(weights).requires_grad_()
    guided = branches(setting.family, setting.settings) == 2
    multiples = torch.ones_like(scales).requires_grad_(guided and wanted.guidance)
    guidance = setting.settings.guidance if guided else 1.0
    return Student(scheduler.grid, scheduler.levels, weights, moves, scales, multiples, guidance)


@torch.no_grad()
def fit(student: Student, lessons: Lessons, timesteps: tuple[int, ...]) -> None:
    """Every step of the student, one after the other, by least squares of where it lands to where the teacher is.

    With guidance, what more of it would add is a second slope of the newest call; its weight says how much of the
    scale the call gets, in later steps too. Calls ask at the grid's own levels. Rows of weights need not add up to
    one, so the clock goes its own way; scales make up for it.
    """
    numbers = list(range(len(lessons.held), lessons.wanted.samples))[:FITTED]
    there, batch = lessons.nodes(numbers, timesteps), lessons.wanted.batch
    cuts = [numbers[first : first + batch] for first in range(0, len(numbers), batch)]
    parts = [lessons.lesson(few, student.grid[0]) for few in cuts]
    x, target = torch.cat([x for _, x, _ in parts]), torch.cat([target for *_, target in parts])
    clock, slopes, window = student.grid[0], list[Tensor](), student.start.shape[1]
    for i, level in enumerate(student.grid[:-1]):
        rows = x.split(batch)
        outputs = [
            asking(path, student.levels)(i, few, torch.tensor(level, dtype=torch.float64))
            for (path, _, _), few in zip(parts, rows, strict=True)
        ]
        whole = tuple(torch.cat(few) for few in zip(*outputs, strict=True))
        wanted = there[i + 1] if i + 1 < len(there) else target
        if student.multiples.requires_grad:
            free, cond = ((x - student.levels.image(x, e, level)) / clock for e in whole)
            at_scale, more = free + student.guidance * (cond - free), cond - free
            step, further = _least_squares([at_scale, more, *slopes[: window - 1]], wanted - x)[:2].tolist()
            if step and LEAST <= (multiple := 1 + further / step / student.guidance) <= MOST:
                student.multiples.data[i] = multiple
        slopes.insert(0, (x - student.levels.image(x, student.joined(i, whole).detach(), level)) / clock)
        moves = _least_squares(slopes[:window], wanted - x)
        step = student.grid[i + 1] - clock
        student.start[i] = 0.0
        student.start[i, : len(moves)] = moves / step
        student.log_scales.data[i] = torch.tensor(level / clock, dtype=torch.float64).log()
        x = x + sum(float(move) * slope for move, slope in zip(moves, slopes, strict=False))
        clock = clock + float(moves.sum())
    if out_of_order(student.grid, student.numbers):
        raise SolverFault(
            f"steps fitted to {len(timesteps)} calls leave the noise levels there are",
            remedy="write --start euler, or another --grid",
        )


def _least_squares(basis: list[Tensor], target: Tensor) -> Tensor:
    """Weights of ``basis``, each ``[B, …]``, whose sum is nearest to ``target``; float64, on the CPU."""
    columns = torch.stack([column.double().flatten() for column in basis], 1)
    gram = columns.T @ columns
    # slopes of neighbouring calls are much alike
    gram += RIDGE * gram.diagonal().diag()
    return torch.linalg.solve(gram, columns.T @ target.double().flatten()).cpu()


def student_solver(flow: bool) -> str:
    """The solver whose noise levels a learned one has."""
    return "flow-euler" if flow else "ipndm"


def spaced(setting: Setting, calls: int, grid: str) -> tuple[int, ...]:
    """Timesteps that no search has chosen: even, or dense where there is little noise."""
    own = whole_timesteps(setting.path(setting.prompts[:1], [0]).route.begin()[0])
    first, last = own[0], own[-1]
    if grid == "even":
        found = torch.linspace(first, last, calls + 1, dtype=torch.float64)[:-1]
    else:
        student = new_student(setting, (first,), SolverSettings())
        ends = student.levels.timestep, student.grid[0], student.levels.last
        ramp = torch.linspace(ends[1] ** (1 / RHO), ends[2] ** (1 / RHO), calls + 1, dtype=torch.float64)[:-1] ** RHO
        found = ends[0](ramp)
    if calls > len(own):
        raise SolverFault(f"{calls} calls of a sampler with {len(own)}", remedy="ask for fewer")
    # steps of the teacher, so that its latents there are known; at least one on from the one before, room for the rest
    whole = list[int]()
    for number, t in enumerate(found.tolist()):
        after = own.index(whole[-1]) + 1 if whole else 0
        free = range(after, len(own) - (calls - number) + 1)
        whole.append(own[min(free, key=lambda place: abs(own[place] - t))])
    return tuple(whole)


def learn(
    setting: Setting,
    timesteps: tuple[int, ...],
    wanted: SolverSettings,
    lessons: Lessons,
    *,
    state: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Learn the numbers of a solver at these timesteps.

    Args:
        state: of an earlier update of the same, which is gone on with.

    Yields:
        At first, and after every update, what to go on from: its ``number``, ``errors`` at first and of the best so
        far, which :func:`best_of` reads, and the rest.
    """
    student = new_student(setting, timesteps, wanted)
    if state is not None:
        student.start.copy_(state["start"])
    elif wanted.start == "fitted":
        student = _fitted(setting, timesteps, wanted, lessons)
    leaves = [leaf for leaf in student.leaves if leaf.requires_grad]
    optimizer = torch.optim.Adam(leaves, lr=wanted.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, wanted.updates)
    number, best = 0, None
    if state is not None:
        number, best = state["number"], best_of(state)
        for leaf, value in zip(student.leaves, state["leaves"], strict=True):
            leaf.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if best is None:
        begun = held_error(lessons, student)
        best = Learned(timesteps, student.numbers, begun, begun)
        yield _state(number, best, student, optimizer, schedule)
    while number < wanted.updates:
        optimizer.zero_grad()
        loss = _one(student, lessons, wanted, number)
        if out_of_order(student.grid, student.numbers) or not loss < float("inf"):
            raise SolverFault(
                f"learning a solver of {len(timesteps)} calls left the levels there are, at update {number}",
                remedy="give a lower --lr, or another --grid",
            )
        optimizer.step()
        schedule.step()
        number += 1
        if number % LOOK_EVERY == 0 or number == wanted.updates:
            now = held_error(lessons, student)
            if now < best.error:
                best = Learned(timesteps, student.numbers, best.begun, now)
        yield _state(number, best, student, optimizer, schedule)


def _fitted(setting: Setting, timesteps: tuple[int, ...], wanted: SolverSettings, lessons: Lessons) -> Student:
    """Fitted with guidance of its own for each call, or with the scale: what ends nearer on samples held back."""
    found = []
    for guidance in (True, False) if wanted.guidance else (False,):
        student = new_student(setting, timesteps, replace(wanted, guidance=guidance))
        fit(student, lessons, timesteps)
        found.append((held_error(lessons, student), student))
        if not student.multiples.requires_grad:
            break
    best = min(found, key=lambda one: one[0])[1]
    best.multiples.requires_grad_(found[0][1].multiples.requires_grad)
    return best


def _state(number: int, best: Learned, student: Student, optimizer: Any, schedule: Any) -> dict[str, Any]:
    return {
        "number": number,
        "timesteps": list(best.timesteps),
        "best": best.numbers.tree(),
        "errors": [best.begun, best.error],
        "start": student.start.clone(),
        "leaves": [leaf.detach().clone() for leaf in student.leaves],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }


def best_of(state: dict[str, Any]) -> Learned:
    """The best that :func:`learn` had found until then, by the samples held back."""
    return Learned(tuple(state["timesteps"]), multistep_of(state["best"]), *state["errors"])


def _one(student: Student, lessons: Lessons, wanted: SolverSettings, number: int) -> float:
    path, x, target = lessons.lesson(lessons.batch(number), student.grid[0])
    ask = asking(path, student.levels)
    if wanted.gradients == "full":
        return full_gradient(student, x, target, ask)
    generator = keyed_generator(lessons.setting.seed, "solver-level", number)
    at = int(torch.randint(len(student.moves), (), generator=generator))
    rows = torch.randperm(len(x), generator=generator)[: max(1, len(x) // PART)].to(x.device)
    return shortcut_gradient(student, x, target, ask, at=at, some=rows, ask_some=asking(path, student.levels, rows))


@torch.no_grad()
def held_error(lessons: Lessons, student: Student) -> float:
    """Root mean square distance to the teacher's latents on the samples held back."""
    total = 0.0
    for first in range(0, len(lessons.held), lessons.wanted.batch):
        numbers = lessons.held[first : first + lessons.wanted.batch]
        path, x, target = lessons.lesson(numbers, student.grid[0])
        found = student.latents(x, asking(path, student.levels))
        total += float((found - target).double().square().mean()) * len(numbers)
    return (total / len(lessons.held)) ** 0.5
