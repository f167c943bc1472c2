"""What a solver is learned from: noises, and where the full sampler ends from them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdo_cli.drawing.pruned import prediction_of
from sdo_cli.progress import Reporter
from sdo_cli.prune.setting import Setting
from sdo_cli.sampling.loop import Path, denoise_path, sample_latents
from sdo_cli.sampling.timesteps import whole_timesteps
from sdo_cli.seeding import key_to_seed, keyed_generator

# samples that steps are fitted to, which are drawn once more
FITTED = 64
# samples that a result is chosen by, never learned from
HELD = 32


@dataclass(frozen=True)
class SolverSettings:
    """Attributes:
    gradients: ``shortcut`` or ``full``.
    window: slopes that a step weighs, 1 … 4.
    scales: also learn at which level each call asks.
    guidance: also learn how much of the guidance each call gets, where there is any.
    grid: where the calls stand at first, one of ``GRIDS``.
    start: the solver to begin as, ``euler`` (which is DDIM), ``ipndm``, or ``fitted``: every step by least squares to
        the teacher's latents.
    samples: noises the teacher is drawn from, one per prompt, prompts in turn; its latents are made once.
    batch: samples of an update.
    """

    gradients: str = "shortcut"
    window: int = 3
    scales: bool = True
    guidance: bool = True
    grid: str = "optimal-steps"
    start: str = "fitted"
    updates: int = 400
    samples: int = 256
    batch: int = 16
    learning_rate: float = 0.02


@dataclass
class Lessons:
    """The teacher's samples: noises and final latents, by number; the first :data:`HELD` are held back.

    Attributes:
        ahead: timesteps that will be asked for, so that one walk of the teacher serves all solvers.
    """

    setting: Setting
    wanted: SolverSettings
    made: dict[int, Tensor] = field(default_factory=dict)
    ahead: set[int] = field(default_factory=set)
    _passed: dict[tuple[int, ...], dict[int, Tensor]] = field(default_factory=dict)

    @property
    def held(self) -> list[int]:
        return list(range(min(HELD, self.wanted.samples // 4)))

    def path(self, numbers: list[int]) -> Path:
        """The teacher's."""
        chosen = [self.setting.prompts_of(j, 1)[0] for j in numbers]
        return self.setting.path(chosen, [key_to_seed(self.setting.seed, "solver-noise", j) for j in numbers])

    def prepare(self, reporter: Reporter) -> None:
        """Draw what is not there yet."""
        missing = [j for j in range(self.wanted.samples) if j not in self.made]
        reporter.phase("teacher", self.wanted.samples, self.wanted.samples - len(missing))
        for first in range(0, len(missing), self.wanted.batch):
            numbers = missing[first : first + self.wanted.batch]
            for j, latent in zip(numbers, sample_latents(self.path(numbers)).cpu(), strict=True):
                self.made[j] = latent
            reporter.advance(len(numbers))

    def batch(self, update: int) -> list[int]:
        """The samples of an update: each comes up once before any comes again."""
        first, count = len(self.held), self.wanted.samples - len(self.held)
        found = []
        for k in range(update * self.wanted.batch, (update + 1) * self.wanted.batch):
            order = torch.randperm(count, generator=keyed_generator(self.setting.seed, "solver-batch", k // count))
            found.append(first + int(order[k % count]))
        return found

    def lesson(self, numbers: list[int], first_level: float) -> tuple[Path, Tensor, Tensor]:
        """The path (for its network), the student's first latents, and where the teacher ended."""
        path = self.path(numbers)
        noise = path.x_0 / path.route.noise_level
        flow = prediction_of(self.setting.family) == "flow_prediction"
        x = noise if flow else noise * (first_level**2 + 1) ** 0.5
        return path, x, torch.stack([self.made[j] for j in numbers]).to(x)

    def nodes(self, numbers: list[int], timesteps: tuple[int, ...]) -> list[Tensor]:
        """The teacher's latents before its calls at these timesteps, in the solver's coordinate, each
        ``[len(numbers), …]``."""
        known = self._passed.setdefault(tuple(numbers), {})
        if missing := self.ahead.union(timesteps).difference(known):
            known.update(self._walk(numbers, missing))
        return [known[t] for t in timesteps]

    @torch.no_grad()
    def _walk(self, numbers: list[int], timesteps: set[int]) -> dict[int, Tensor]:
        parts = []
        for first in range(0, len(numbers), self.wanted.batch):
            path, found = self.path(numbers[first : first + self.wanted.batch]), dict[int, Tensor]()
            own = whole_timesteps(path.route.begin()[0])
            flow = prediction_of(self.setting.family) == "flow_prediction"

            def call(i: int, x: Tensor, t: Tensor, path=path, found=found, own=own, flow=flow) -> Tensor:  # type: ignore[no-untyped-def]
                if own[i] in timesteps:
                    level = path.route.levels[i]
                    found[own[i]] = x / level.scale / (1.0 if flow else level.alpha)
                return path.denoise(x, t, path.rows)

            denoise_path(path, call)
            parts.append(found)
        return {t: torch.cat([part[t] for part in parts]) for t in timesteps}
