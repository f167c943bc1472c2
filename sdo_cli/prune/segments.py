"""Segments: an evolution over skip plans, without training (Flexiffusion, arXiv 2409.17566 and 2506.02488).

The trajectory is cut into even segments. A segment is one whole call, then partial calls that compute one of the
network's branches and take the rest from before, then calls that only hand the last output on. Its genes are the branch
and how many calls are active. Candidates are compared by the distance of their pictures to the full sampler's, on a few
prompts; every budget takes the nearest one that fits it.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.prune.baselines import every
from sdo_cli.prune.ratios import Budget
from sdo_cli.prune.search import DISTANCES
from sdo_cli.prune.setting import Setting
from sdo_cli.sampling.loop import Path, sample_latents
from sdo_cli.seeding import key_to_seed, keyed_generator
from sdo_cli.skipping.liveness import Wiring, live

# per segment (branch, active calls); branch 0 is the cheapest
Genes = tuple[tuple[int, int], ...]
# parents are drawn from so many nearest ones that fit a budget
PARENTS = 6


@dataclass(frozen=True)
class SegmentSettings:
    """Attributes:
    generations: how often a population is made and drawn.
    population: candidates of a generation.
    prompts: how many each is drawn on.
    distance: ``ssim``, ``l1`` or ``l2`` of decoded pictures.
    """

    generations: int = 12
    population: int = 16
    prompts: int = 8
    distance: str = "ssim"


def branches(wiring: Wiring, shares: Tensor) -> list[frozenset[int]]:
    """Ways from the first unit to the output, by cost; the last is the whole network.

    For every unit the cheapest way through it: in a UNet the skip connections, outermost first.
    """
    cost = shares.tolist()
    onward: list[set[int]] = [set() for _ in wiring.units]
    for unit, read in enumerate(wiring.reads):
        for earlier in read:
            onward[earlier].add(unit)
    there = _cheapest({0}, onward, cost)
    back = _cheapest(set(wiring.output), [set(read) for read in wiring.reads], cost)
    found = {
        frozenset(_way(unit, there) + _way(unit, back))
        for unit in range(len(wiring.units))
        if unit in there and unit in back
    }
    found.add(frozenset(range(len(wiring.units))))
    return sorted(found, key=lambda way: (sum(cost[unit] for unit in way), sorted(way)))


def _cheapest(begin: set[int], onward: list[set[int]], cost: list[float]) -> dict[int, tuple[float, int | None]]:
    """Dijkstra over units: what each costs to reach, itself included, and the unit before it."""
    found: dict[int, tuple[float, int | None]] = {}
    waiting: list[tuple[float, int, int | None]] = [(cost[unit], unit, None) for unit in sorted(begin)]
    heapq.heapify(waiting)
    while waiting:
        spent, unit, before = heapq.heappop(waiting)
        if unit in found:
            continue
        found[unit] = (spent, before)
        for other in sorted(onward[unit]):
            heapq.heappush(waiting, (spent + cost[other], other, unit))
    return found


def _way(unit: int | None, found: dict[int, tuple[float, int | None]]) -> list[int]:
    way = []
    while unit is not None:
        way.append(unit)
        unit = found[unit][1]
    return way


def lengths(calls: int, segments: int) -> list[int]:
    """Calls of every segment; they begin where uniform reuse of as many whole calls has these."""
    first = [*every(calls, segments).nonzero()[:, 0].tolist(), calls]
    return [end - start for start, end in itertools.pairwise(first)]


def runs_of(genes: Genes, calls: int, ways: list[frozenset[int]], wiring: Wiring) -> Tensor:
    """``[calls, units]``: what is computed under these genes."""
    gates = torch.zeros(calls, len(wiring.units), dtype=torch.bool)
    start = 0
    for (branch, active), length in zip(genes, lengths(calls, len(genes)), strict=True):
        gates[start] = True
        gates[start + 1 : start + active, sorted(ways[branch])] = True
        start += length
    return live(gates, wiring)


@dataclass
class Evolution:
    """A search: what it has drawn, and what it draws next.

    Attributes:
        ratios: the budgets, shares of the computation to leave out.
        drawn: genes to (share kept, distance).
        generation: how many are done.
    """

    setting: Setting
    wanted: SegmentSettings
    ratios: list[float]
    drawn: dict[Genes, tuple[float, float]] = field(default_factory=dict)
    generation: int = 0

    def __post_init__(self) -> None:
        self.ways = branches(self.setting.wiring, self.setting.budget.shares)

    @property
    def budget(self) -> Budget:
        return self.setting.budget

    def runs(self, genes: Genes) -> Tensor:
        return runs_of(genes, self.setting.calls, self.ways, self.setting.wiring)

    def best(self, ratio: float) -> Genes:
        """The nearest that leaves out at least this share, or else the cheapest."""
        fits = [genes for genes in self.drawn if self.drawn[genes][0] <= 1 - ratio + 1e-9]
        if fits:
            return min(fits, key=lambda genes: (self.drawn[genes][1], genes))
        return min(self.drawn, key=lambda genes: (self.drawn[genes][0], genes))

    def front(self) -> list[tuple[Genes, float, float]]:
        """Candidates that none beats in both, cheapest first."""
        found, nearest = [], float("inf")
        for genes, (kept, distance) in sorted(self.drawn.items(), key=lambda item: (item[1], item[0])):
            if distance < nearest:
                found.append((genes, kept, distance))
                nearest = distance
        return found

    def children(self) -> list[Genes]:
        """The candidates of the next generation, none of which was drawn before; the budgets in turn."""
        generator = keyed_generator(self.setting.seed, "segments", self.generation)
        found = dict[Genes, None]()
        for attempt in range(20 * self.wanted.population):
            if len(found) == self.wanted.population:
                break
            ratio = self.ratios[attempt % len(self.ratios)]
            genes = self._first(attempt // len(self.ratios), ratio) if self.generation == 0 else None
            if genes is None:
                parents = sorted(
                    (g for g in self.drawn if self.drawn[g][0] <= 1 - ratio + 1e-9), key=lambda g: (self.drawn[g][1], g)
                )[:PARENTS]
                chance = int(torch.randint(4, (), generator=generator))
                genes = (
                    self._mutated(parents[_below(len(parents), generator)], generator)
                    if parents and chance
                    else self._random(ratio, generator)
                )
            genes = self._fitted(genes, ratio, generator)
            if genes not in self.drawn:
                found[genes] = None
        return list(found)

    def _first(self, number: int, ratio: float) -> Genes | None:
        """The two ends, to begin with: uniform reuse, and the outermost branch at every call in between."""
        most = max(1, int((1 - ratio) * self.setting.calls + 1e-9))
        if number == 0:
            return ((0, 1),) * most
        if number > 1:
            return None
        for segments in range(most, 0, -1):
            genes = tuple((0, length) for length in lengths(self.setting.calls, segments))
            if self.budget.allows(self.runs(genes), ratio):
                return genes
        return None

    def _random(self, ratio: float, generator: torch.Generator) -> Genes:
        most = max(1, int((1 - ratio) * self.setting.calls + 1e-9))
        segments = 1 + _below(most, generator)
        return tuple(
            (_below(len(self.ways), generator), 1 + _below(length, generator))
            for length in lengths(self.setting.calls, segments)
        )

    def _mutated(self, genes: Genes, generator: torch.Generator) -> Genes:
        """One or two segments made anew; now and then one segment more or less."""
        count = len(genes)
        if _below(5, generator) == 0:
            count = max(1, min(self.setting.calls, count + (1 if _below(2, generator) else -1)))
        sizes = lengths(self.setting.calls, count)
        new = [(branch, min(active, size)) for (branch, active), size in zip(genes, sizes, strict=False)]
        new += [(0, 1)] * (count - len(new))
        for _ in range(1 + _below(2, generator)):
            place = _below(count, generator)
            new[place] = (_below(len(self.ways), generator), 1 + _below(sizes[place], generator))
        return tuple(new)

    def _fitted(self, genes: Genes, ratio: float, generator: torch.Generator) -> Genes:
        """With fewer active calls, and at last fewer segments, until it fits the budget; unused branches are 0."""
        while not self.budget.allows(self.runs(genes), ratio):
            busy = [place for place, (_, active) in enumerate(genes) if active > 1]
            if busy:
                place = busy[_below(len(busy), generator)]
                branch, active = genes[place]
                genes = (*genes[:place], (branch, active - 1), *genes[place + 1 :])
            elif len(genes) > 1:
                genes = genes[:-1]
            else:
                break
        return tuple((branch if active > 1 else 0, active) for branch, active in genes)

    def state(self) -> dict[str, Any]:
        """What :meth:`go_on` takes; JSON."""
        rows = [[[list(gene) for gene in genes], kept, distance] for genes, (kept, distance) in self.drawn.items()]
        return {"generation": self.generation, "drawn": rows}

    def go_on(self, state: dict[str, Any]) -> None:
        self.generation = state["generation"]
        self.drawn = {
            tuple((int(branch), int(active)) for branch, active in genes): (kept, distance)
            for genes, kept, distance in state["drawn"]
        }


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def evolve(evolution: Evolution, world: World = SINGLE) -> Iterator[Evolution]:
    """A generation after each result; its candidates are dealt out to the processes."""
    setting, wanted = evolution.setting, evolution.wanted
    chosen = [setting.prompts_of(j, 1)[0] for j in range(min(wanted.prompts, len(setting.prompts)))]
    seeds = [key_to_seed(setting.seed, "segments-noise", j) for j in range(len(chosen))]
    full = _pictures(setting, setting.path(chosen, seeds)) if evolution.generation < wanted.generations else None
    while evolution.generation < wanted.generations and full is not None:
        children, mine = evolution.children(), dict[int, float]()
        for number in filter(world.mine, range(len(children))):
            plan = setting.plan(evolution.runs(children[number]))
            pictures = _pictures(setting, setting.path(chosen, seeds, plan=plan))
            mine[number] = float(DISTANCES[wanted.distance](pictures, full).double().mean())
        every_one = {number: distance for theirs in world.gather(mine) for number, distance in theirs.items()}
        for number, genes in enumerate(children):
            evolution.drawn[genes] = (evolution.budget.kept(evolution.runs(genes)), every_one[number])
        evolution.generation += 1
        yield evolution


@torch.no_grad()
def _pictures(setting: Setting, path: Path) -> Tensor:
    return torch.cat([setting.family.decode(few) for few in sample_latents(path).split(4)])
