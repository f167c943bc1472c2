"""What `sdo prune` is asked for, as data."""

from dataclasses import dataclass, field
from pathlib import Path

from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.models.load import ModelSource
from sdo_cli.prune.lessons import SolverSettings
from sdo_cli.prune.search import SearchSettings
from sdo_cli.prune.segments import SegmentSettings
from sdo_cli.recipe.schema import RewardSpec


@dataclass(frozen=True)
class MeasureSettings:
    """Attributes:
    prompts: none of the search's.
    rewards: measured beside the similarity to the full sampler's images; nothing is chosen by them.
    controls: also measure samplers with as much computation.
    rounds: of timing.
    """

    prompts: list[str]
    rewards: list[RewardSpec] = field(default_factory=list)
    controls: bool = True
    rounds: int = 3
    batch_size: int = 16


@dataclass(frozen=True)
class PruneJob:
    """Attributes:
    method: ``dip-go``, a baseline or a step schedule.
    ratios: shares of the network's computation to leave out.
    prompts: the search's.
    scores: folder of an earlier search, whose keep-scores are taken instead of searching.
    schedule: a plan whose own steps are pruned further.
    solver: how a solver is learned.
    segments: how segments evolve.
    """

    source: ModelSource
    precision: str
    settings: DrawSettings
    method: str
    ratios: list[float]
    grain: str
    prompts: list[str]
    search: SearchSettings
    measure: MeasureSettings
    seed: int = 0
    lora: str | None = None
    lora_scale: float = 1.0
    scores: Path | None = None
    schedule: Path | None = None
    solver: SolverSettings = field(default_factory=SolverSettings)
    segments: SegmentSettings = field(default_factory=SegmentSettings)
