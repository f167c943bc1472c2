"""Step schedules: which K of a teacher's N timesteps bring a solver nearest to where all N would.

    x_i             latent of the teacher at node i = 0 … N; node 0 is the noise, node N the final latent
    z_j             latent of a student with fewer steps at node j
    jump(i → j)     one step of the solver from node i to node j, z_j = a_ij z_i + b_ij e_i
    A_j             what the rest of the linear path multiplies a change at node j with, on its way to x_N

A schedule is the list of nodes a student jumps from. It begins with the noisiest and is the same for all samples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from sdo_cli.errors import SolverFault
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter, Silent
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import Path, denoise_path
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.timesteps import whole_timesteps

State = TypeVar("State")
# jump(i, state at node i) -> node j, cost there, state there, for every j > i
Jump = Callable[[int, State], Iterable[tuple[int, float, State]]]

ONE_STEP = "ddim, euler and flow-euler"


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    timesteps: falling, whole; ``DrawSettings.timesteps`` and ``Route.timesteps`` take them.
    error: root mean square distance to the teacher's final latent on the samples searched with; estimated in
        :func:`pairwise`, measured in :func:`optimal_stepsize`.
    """

    timesteps: tuple[int, ...]
    error: float


def cheapest_walks(
    nodes: int,
    budget: int,
    start: State,
    jump: Jump[State],
    prepare: Callable[[dict[int, State]], None] = lambda states: None,
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Dynamic programming over walks from node 0 to the last one, for every number of jumps at once.

    Keeps the cheapest state at every node for every number of jumps. Where a state is the sum of its jumps' costs,
    and is its own cost, that is the cheapest of all walks; otherwise it is the greedy choice at every node.

    Args:
        nodes: how many, the last included.
        budget: most jumps.
        start: the state at node 0.
        prepare: is told the states by node before anything is asked of them.

    Returns:
        For 1 … ``budget`` jumps the cost at the last node, and the nodes jumped from.
    """
    here: dict[int, tuple[float, State, tuple[int, ...]]] = {0: (0.0, start, ())}
    found = {}
    for count in range(1, budget + 1):
        there: dict[int, tuple[float, State, tuple[int, ...]]] = {}
        prepare({i: state for i, (_, state, _) in here.items()})
        for i, (_, state, walked) in here.items():
            for j, cost, new in jump(i, state):
                if j not in there or cost < there[j][0]:
                    there[j] = (cost, new, (*walked, i))
        cost, _, walked = there.pop(nodes - 1)
        found[count] = (cost, walked)
        here = dict(sorted(there.items()))
    return found


@dataclass(frozen=True)
class Nodes:
    """The nodes of a one-step solver's route, and the jumps between them.

    Raises:
        SolverFault: the solver carries history, adds noise, or does not step from one of its noise levels to the next.
    """

    route: Route

    def __post_init__(self) -> None:
        c = coefficients_of(self.route)
        A, w = self.linear_path[0], [self.jump(i, i + 1)[1] * self.linear_path[i + 1] for i in range(self.last)]
        # schedulers compute in float32; a first or last step of another order is off by far more
        near = 1e-4 * max(map(abs, c.w))
        same = abs(c.A - A) <= 1e-4 * abs(A) and all(abs(p - q) <= near for p, q in zip(c.w, w, strict=True))
        if self.route.takes_noise or not same:
            name = type(self.route.scheduler).__name__
            raise SolverFault(
                f"{name} does not step here from one noise level to the next, so that no step can be left out",
                remedy=f"search with one of {ONE_STEP}, without noise, from steps spaced as diffusers' default",
            )

    @property
    def last(self) -> int:
        """N; there are N + 1 nodes."""
        return len(self.route.levels)

    @cached_property
    def timesteps(self) -> Tensor:
        """What the network is told at each node but the last, ``[N]``."""
        return self.route.begin()[1]

    def jump(self, i: int, j: int) -> tuple[float, float]:
        """``(a_ij, b_ij)``: image and noise as the output at node i has them, put together as node j wants them."""
        here = self.route.levels[i]
        alpha, sigma = self.route.end if j == self.last else (self.route.levels[j].alpha, self.route.levels[j].sigma)
        return alpha * here.x0_of_x + sigma * here.eps_of_x, alpha * here.x0_of_e + sigma * here.eps_of_e

    @cached_property
    def linear_path(self) -> list[float]:
        """``A_j`` of every node."""
        factors = [1.0]
        for i in reversed(range(self.last)):
            factors.append(factors[-1] * self.jump(i, i + 1)[0])
        return factors[::-1]

    def schedule(self, walk: tuple[int, ...], error: float) -> Schedule:
        whole = self.route.timesteps or whole_timesteps(self.route.begin()[0])
        return Schedule(tuple(whole[self.route.start :][i] for i in walk), error)


@torch.no_grad()
def teacher(path: Path, nodes: Nodes, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's walk: latents ``[B, …]`` of every node, and outputs ``[B, …]`` of every node but the last."""
    parts = [_walked(path, nodes, rows) for rows in path.rows.split(batch_size)]
    latents, outputs = ([torch.cat(few) for few in zip(*side, strict=True)] for side in zip(*parts, strict=True))
    return latents, outputs


def _walked(path: Path, nodes: Nodes, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    latents: list[Tensor] = []
    outputs: list[Tensor] = []

    def call(i: int, scaled: Tensor, t: Tensor) -> Tensor:
        latents.append(scaled / nodes.route.levels[i].scale)
        outputs.append(path.denoise(scaled, t, rows))
        return outputs[-1]

    x_N = denoise_path(path, call, rows=rows)
    return [*latents, x_N], outputs


@torch.no_grad()
def optimal_stepsize(
    path: Path, budget: int, *, batch_size: int = 16, reporter: Reporter | None = None, world: World = SINGLE
) -> dict[int, Schedule]:
    """Optimal Stepsize distillation (arXiv 2503.21774, algorithm 1), with one schedule for all samples.

    A student's latent is computed anew where it goes: at every node, for every number of jumps, the jump that lands
    nearest to the teacher is kept, in the mean over samples.

    Args:
        path: the teacher's, of a one-step solver without noise; samples ``[B, …]`` of the prompts to search with.
        budget: most steps wanted, 1 … N.
        batch_size: samples the network sees at a time.
        world: the processes that the nodes of each number of jumps are dealt out to.

    Returns:
        The schedule of every number of steps up to ``budget``. About ``budget · N - budget² / 2`` network calls per
        sample besides the teacher's N.
    """
    nodes = _nodes(path, budget)
    latents, outputs = teacher(path, nodes, batch_size)
    reporter, ready = reporter or Silent(), dict[int, Tensor]()
    reporter.phase("optimal-steps", 1 + sum(nodes.last - count + 1 for count in range(2, budget + 1)))

    def prepare(states: dict[int, Tensor]) -> None:
        """The network's output at every node."""
        numbers, mine = list(states), dict[int, Tensor]()
        for round_ in world.rounds(len(numbers)):
            for i in (numbers[k] for k in round_ if world.mine(k)):
                e = outputs[0] if i == 0 else _output(path, nodes, i, states[i], batch_size)
                mine[i] = e if world.size == 1 else e.cpu()
            reporter.advance(len(round_))
        ready.clear()
        for theirs in world.gather(mine):
            ready.update(theirs)

    def jump(i: int, z: Tensor) -> Iterable[tuple[int, float, Tensor]]:
        e = ready[i].to(z.device)
        for j in range(i + 1, nodes.last + 1):
            a, b = nodes.jump(i, j)
            landed = a * z + b * e
            yield j, _mean_square(landed - latents[j]), landed

    found = cheapest_walks(nodes.last + 1, budget, latents[0], jump, prepare)
    return {count: nodes.schedule(walk, cost**0.5) for count, (cost, walk) in found.items()}


@torch.no_grad()
def pairwise(path: Path, *, carried: bool = True, batch_size: int = 16) -> dict[int, Schedule]:
    """Least sum of pair costs on the teacher's path, as Watson et al. (arXiv 2106.03802) choose steps.

    The cost of a pair is the squared error of one jump from the teacher's ``x_i`` with its ``e_i`` to ``x_j``. Errors
    of jumps are added as if they were independent.

    Args:
        path, batch_size: as in :func:`optimal_stepsize`.
        carried: times ``A_j²``, as the error would arrive at ``x_N`` if the network did not answer to it.

    Returns:
        The schedule of every number of steps 1 … N, for the teacher's N network calls per sample.
    """
    nodes = _nodes(path, 1)
    costs = pair_costs(nodes, *teacher(path, nodes, batch_size), carried=carried)

    def jump(i: int, spent: float) -> Iterable[tuple[int, float, float]]:
        for j in range(i + 1, nodes.last + 1):
            yield j, spent + costs[i][j], spent + costs[i][j]

    found = cheapest_walks(nodes.last + 1, nodes.last, 0.0, jump)
    return {count: nodes.schedule(walk, cost**0.5) for count, (cost, walk) in found.items()}


def pair_costs(
    nodes: Nodes, latents: list[Tensor], outputs: list[Tensor], *, carried: bool = True
) -> list[list[float]]:
    """``[N, N + 1]``: of a jump from the row's node to the column's; 0 where there is none."""
    factors = nodes.linear_path if carried else [1.0] * (nodes.last + 1)
    table = [[0.0] * (nodes.last + 1) for _ in range(nodes.last)]
    for i, row in enumerate(table):
        for j in range(i + 1, nodes.last + 1):
            a, b = nodes.jump(i, j)
            row[j] = _mean_square(factors[j] * (a * latents[i] + b * outputs[i] - latents[j]))
    return table


def _nodes(path: Path, budget: int) -> Nodes:
    nodes = Nodes(path.route)
    if not 1 <= budget <= nodes.last:
        raise SolverFault(f"{budget} steps out of a teacher's {nodes.last}", remedy=f"ask for 1 to {nodes.last}")
    return nodes


def _output(path: Path, nodes: Nodes, i: int, z: Tensor, batch_size: int) -> Tensor:
    """The network's output for latents at node i, ``[B, …]``."""
    scaled, t = nodes.route.levels[i].scale * z, nodes.timesteps[i].to(z.device)
    return torch.cat([path.denoise(scaled[rows], t.expand(len(rows)), rows) for rows in path.rows.split(batch_size)])


def _mean_square(difference: Tensor) -> float:
    return difference.float().square().mean().item()
