"""The whole examination of a recipe."""

from dataclasses import dataclass

from sdo_cli.doctor.advice import Advice, advise, estimate_recipe
from sdo_cli.doctor.environment import Finding, look_around, named_gpu
from sdo_cli.doctor.target import Target
from sdo_cli.errors import EnvironmentFault
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.stages import Estimate
from sdo_cli.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Examination:
    """Attributes:
    estimate: None when an architecture is not known on this machine; ``why_not`` then says so.
    advice: what makes it fit; None when it fits as it is, or cannot be estimated.
    """

    findings: tuple[Finding, ...]
    target: Target
    estimate: Estimate | None
    why_not: str = ""
    advice: Advice | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the recipe as it is fits the target; None when that is not known."""
        return None if self.estimate is None else self.target.needed(self.estimate.peak) <= self.target.memory

    @property
    def speed(self) -> Speed | None:
        """Of the target, where it is known for all precisions of the estimate."""
        speed = self.target.speed
        return None if speed is None or self.estimate is None or not self.estimate.is_known(speed) else speed

    @property
    def problems(self) -> int:
        """What keeps the recipe from running here."""
        return sum(not finding.ok for finding in self.findings) + (self.fits is not True)


def examine(loaded: LoadedRecipe, target: Target) -> Examination:
    """Look at this machine, estimate the recipe, and find what to change when it does not fit.

    Raises:
        RecipeFault: sizes or a solver that the model does not take.
    """
    findings = (*look_around(loaded.recipe, [loaded.given, *loaded.overrides]), *named_gpu(loaded.recipe, target))
    try:
        found = estimate_recipe(loaded, target)
    except EnvironmentFault as fault:
        return Examination(findings, target, None, f"{fault.message}; {fault.remedy}")
    if target.needed(found.peak) <= target.memory:
        return Examination(findings, target, found)
    return Examination(findings, target, found, advice=advise(loaded, target, found))
