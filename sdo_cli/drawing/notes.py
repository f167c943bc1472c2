"""What is said once before pictures are drawn: settings that mean something else than they seem to."""

from collections.abc import Iterable

from sdo_cli.drawing.draw import DrawSettings, make_route, native_of
from sdo_cli.drawing.prompts import cut_prompts
from sdo_cli.models.base import Family
from sdo_cli.prompt_sets.syntax import syntax_notes
from sdo_cli.sampling.solvers import AUTO

# a network asked at a timestep below this sees next to no noise
NEARLY_CLEAN = 20


def drawing_notes(family: Family, prompts: Iterable[str], settings: DrawSettings) -> list[str]:
    """A sentence each: a model that says two things, cut prompts, commands of other programs in prompts, a solver that
    stands in, no guidance, a late step.
    """
    every = list(prompts)
    found = [*family.notes, *cut_prompts(family, every), *syntax_notes(every)]
    found += [f"negative_prompt: {sentence}" for sentence in syntax_notes([settings.negative_prompt])]
    if settings.solver == AUTO and (own := native_of(family, settings)).instead_of:
        found.append(f"solver auto: {own.solver} stands in for the model's own {own.instead_of}")
    if settings.guidance_scale < 1 and not family.takes_guidance:
        found.append(f"guidance_scale {settings.guidance_scale:g} is without guidance, as 1 is")
    if settings.num_inference_steps == 1 and (t := float(make_route(family, settings).begin()[1][0])) < NEARLY_CLEAN:
        found.append(
            f"1 step: this model's timestep_spacing puts it at t = {t:g}, where there is next to no noise to take away;"
            " timestep_spacing: trailing begins at the noisiest"
        )
    return found
