"""What a bench has found so far."""

from dataclasses import dataclass

from sdo_cli.bench.cost import CostTable
from sdo_cli.bench.memory import Memory
from sdo_cli.bench.nearness import Nearness
from sdo_cli.bench.training import Comparison
from sdo_cli.bench.variants import Variant


@dataclass
class BenchResult:
    cost: CostTable
    memory: dict[Variant, Memory]
    nearness: dict[Variant, Nearness]
    training: Comparison | None
