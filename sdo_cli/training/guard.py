"""Over-optimisation: is the model getting better, or only better at its reward?

At intervals prompts of their own are drawn and scored with the trained rewards, with rewards that are not trained on,
by diversity and by distance from the model as it was. ``best/`` is chosen by the rewards that are not trained on; the
judge never takes part, nor do the prompts a run is reported on.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rewards
from rewards.base import Reward
from sdo_cli.device import pick_device
from sdo_cli.drawing.draw import draw_settings
from sdo_cli.errors import TrainingFault
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import Recipe, RewardSpec
from sdo_cli.records.check import OBJECTIVE, Check, Verdict, checks_of, quality, verdict
from sdo_cli.scoring.embedded_measures import distances, diversities
from sdo_cli.scoring.latents import as_measure
from sdo_cli.scoring.measure_names import DISTANCE, DIVERSITY
from sdo_cli.training.job import Job
from sdo_cli.training.prepare import guard_prompts, measures_of, not_trained, only_measured, reward_of
from sdo_cli.training.validate import Validation
from sdo_cli.weights.needs import explaining

# the package's own where that is what there is
CLIP_SCORE, EMBEDDERS = "clip-score", ("clip-score", "clip-embedded")


@dataclass
class Guard:
    """Draws and scores checks; remembers them and the best weights."""

    validation: Validation
    clip: Any
    untrained: list[str]
    objective: Callable[[dict[str, Tensor]], Tensor]
    checks: list[Check] = field(default_factory=list)
    base: Tensor | None = None
    best: list[Tensor] | None = None
    best_step: int = 0

    @property
    def size(self) -> int:
        """Images of a check."""
        return len(self.validation.pairs)

    def check(self, job: Job, step: int, reporter: Reporter) -> Check:
        """Draw and score; every process does its part and knows the result."""
        validation = self.validation

        def measured(images: Tensor, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
            with torch.no_grad():
                rows = self.clip.encoder.images(images.to(job.family.device)).float().cpu()
            return validation.scores(job.family, images, prompts), rows

        parts = validation.for_batches(job.family, range(self.size), measured, reporter)
        tables = {name: validation.table([scores[name] for scores, _ in parts]) for name in validation.rewards}
        rows = validation.table([embeddings for _, embeddings in parts])
        if step == 0 or self.base is None:
            self.base = rows
        tables |= {OBJECTIVE: self.objective(tables), DISTANCE: distances(rows, self.base)}
        values = {name: table.double().mean(1).tolist() for name, table in tables.items()}
        if validation.seeds > 1:
            values[DIVERSITY] = diversities(rows).tolist()
        if step == 0 and (bad := next((name for name, v in values.items() if not np.isfinite(v).all()), None)):
            raise TrainingFault(
                f"the untrained model's {bad} is not a finite number", remedy="try mixed_precision=no, or another vae"
            )
        found = Check(step, values, self.untrained)
        self.checks.append(found)
        return found

    def verdict(self) -> Verdict | None:
        return verdict(self.checks) if len(self.checks) > 1 else None

    def keep_if_best(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Remember the weights of the last check if none was better."""
        last = self.checks[-1].step
        found = self.verdict()
        if found is None or found.best != last or not np.isfinite(quality(self.checks[-1], self.checks[0])).all():
            return False
        self.best, self.best_step = [p.detach().cpu().clone() for p in parameters], last
        return True

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the checks so far, the best weights, and what the model drew at first."""
        checks = [asdict(check) for check in self.checks]
        return {"checks": checks, "base": self.base, "best": self.best, "best_step": self.best_step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.base, self.best, self.best_step = state["base"], state["best"], state["best_step"]
        self.checks = checks_of(state["checks"])

    def is_over(self, patience: int) -> bool:
        """Whether so many checks in a row were bad."""
        found = self.verdict()
        return found is not None and found.bad >= patience


def make_guard(loaded: LoadedRecipe, job: Job, validation: Validation | None) -> Guard | None:
    """None when the recipe asks for no checks. Rewards that ``validation`` has already are not loaded again."""
    recipe, spec = loaded.recipe, loaded.recipe.guard
    if not spec.steps:
        return None
    with explaining(recipe, loaded.given, loaded.overrides):
        there = {_key(spec): name for name, spec in only_measured(recipe).items()} if validation else {}
        untrained = {
            name: validation.rewards[there[_key(spec)]]
            if validation and _key(spec) in there
            else as_measure(name, reward_of(spec, recipe, pick_device()), job.family)
            for name, spec in guard_rewards(recipe).items()
        }
        trained = measures_of(job)
        there_too = validation.rewards if validation else {}
        clip = _embedder(trained | untrained | there_too) or reward_of(RewardSpec(CLIP_SCORE), recipe, pick_device())
    drawn = Validation(
        prompts=guard_prompts(loaded),
        seeds=spec.seeds,
        run_seed=recipe.seed,
        rewards=trained | untrained,
        settings=draw_settings(recipe),
        batch_size=recipe.validation.batch_size,
        embed=job.embed,
        world=job.world,
        purpose="guard",
    )

    def objective(tables: dict[str, Tensor]) -> Tensor:
        return -sum((item.loss_of(tables[item.name]) for item in job.rewards), torch.zeros(()))

    return Guard(drawn, clip, list(untrained), objective)


def _key(spec: RewardSpec) -> str:
    """The same for specs that build the same reward."""
    return f"{rewards.full_name(spec.name)} {spec.options}"


def guard_rewards(recipe: Recipe) -> dict[str, RewardSpec]:
    """What the guard selects by."""
    return not_trained(recipe, recipe.guard.rewards)


def _embedder(known: dict[str, Reward]) -> Reward | None:
    """A CLIP that is there already."""
    found = {rewards.full_name(name): reward for name, reward in known.items()}
    return next((found[name] for name in EMBEDDERS if name in found), None)
