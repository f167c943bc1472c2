"""What has to be computed (the SubNet of DiP-GO; Zhu et al. 2024, arXiv 2410.16942).

A gate says, per network call and unit, to compute the unit or to take its most recent output. What is computed in the
end is less: a unit runs only where something reads its output, at this call or, through the gates, at a later one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wiring:
    """What reads what inside one network call. Units are numbered in the order in which they run.

    Attributes:
        units: names.
        reads: per unit the units whose outputs reach its inputs.
        output: units whose outputs reach the network's output.
        inputs_reach_output: latent, timestep or prompt reach the output beside all units; where they do not, a call
            that computes no unit repeats the output of the one before.
    """

    units: tuple[str, ...]
    reads: tuple[frozenset[int], ...]
    output: frozenset[int]
    inputs_reach_output: bool


def live(gates: Tensor, wiring: Wiring) -> Tensor:
    """``[calls, units]`` bool: what is computed under ``gates [calls, units]`` (true: compute, false: reuse).

    The first call computes everything.
    """
    gates = gates.bool().clone()
    gates[0] = True
    calls, units = gates.shape
    open_, runs = gates.tolist(), torch.zeros(calls, units, dtype=torch.bool)
    wanted: list[set[int]] = [set() for _ in range(calls)]
    for i in reversed(range(calls)):
        wanted[i] |= wiring.output
        for b in reversed(range(units)):
            if b not in wanted[i]:
                continue
            if open_[i][b]:
                runs[i, b] = True
                wanted[i] |= wiring.reads[b]
            else:
                wanted[i - 1].add(b)
    runs[0] = True
    return runs


def stored_reads(runs: Tensor, wiring: Wiring) -> list[frozenset[int]]:
    """Per call the units whose stored output is read: not computed, and read by one that is or by the output."""
    found = []
    for row in runs.tolist():
        readers = [wiring.reads[b] for b, computed in enumerate(row) if computed]
        read = wiring.output.union(*readers)
        found.append(frozenset(b for b in read if not row[b]))
    return found


def read_later(runs: Tensor, reads: list[frozenset[int]]) -> list[frozenset[int]]:
    """Per call the units whose output of then, made there or before, is read at a later call; ``reads`` of each."""
    found: list[frozenset[int]] = []
    wanted = frozenset[int]()
    for row, read in zip(reversed(runs.tolist()), reversed(reads), strict=True):
        found.append(wanted)
        wanted = (wanted - {b for b, computed in enumerate(row) if computed}) | read
    return found[::-1]
