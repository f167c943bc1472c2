"""A skip plan put on a model: does it fit, and what is drawn with it."""

from dataclasses import replace

import torch

from sdo_cli.drawing.draw import DrawSettings, branches, make_route, solver_of
from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import sdo
from sdo_cli.models.base import Family
from sdo_cli.sampling.guidance import Condition
from sdo_cli.sampling.scheduler_config import is_flow
from sdo_cli.sampling.solvers import NOISY_SOLVERS
from sdo_cli.skipping.liveness import Wiring
from sdo_cli.skipping.observe import observe
from sdo_cli.skipping.skip_plan import MadeFor, SkipPlan
from sdo_cli.skipping.walking import Skips


def made_for(family: Family, settings: DrawSettings) -> MadeFor:
    """What a plan made here fits."""
    learned = settings.multistep is not None
    return MadeFor(
        family.source,
        family.architecture,
        solver_of(family, settings),
        settings.num_inference_steps,
        settings.timesteps,
        settings.multistep,
        prediction_of(family) if learned else None,
    )


def prediction_of(family: Family) -> str:
    """``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``."""
    config = family.scheduler_config
    return "flow_prediction" if is_flow(config) else str(config.get("prediction_type", "epsilon"))


def wiring_of(family: Family, grain: str, condition: Condition) -> Wiring:
    """What reads what in the family's network, seen in one call for one sample.

    Args:
        condition: of any prompts; the first is taken.
    """
    one = {key: value[:1] for key, value in condition.items()}
    x = torch.zeros(1, *family.latent_shape(), device=family.device)
    t = torch.zeros(1, dtype=torch.long, device=family.device)
    return observe(family.skippable(grain), (x, t, *one.values()), lambda: family.network(x, t, one))


def with_plan(settings: DrawSettings, plan: SkipPlan) -> DrawSettings:
    """The settings, with the plan's own steps where it has some."""
    its = plan.made_for
    if its.timesteps is None:
        return settings
    settings = replace(settings, num_inference_steps=len(its.timesteps), timesteps=its.timesteps)
    # a learned solver stands in for whatever the full one is
    return settings if its.multistep is None else replace(settings, solver=its.solver, multistep=its.multistep)


def skips_of(plan: SkipPlan, family: Family, settings: DrawSettings, *, exact: bool = False) -> Skips:
    """The plan on this model's modules, for these settings.

    Args:
        exact: which gradients; see :class:`sdo_cli.skipping.walking.Skips`.

    Raises:
        EnvironmentFault: made for another architecture, solver or number of steps.
    """
    mine, theirs = made_for(family, settings), plan.made_for
    remedy = f"make one for this with {sdo('prune')}"
    if make_route(family, settings).takes_noise:
        raise EnvironmentFault(
            "a skip plan is for a solver without noise",
            remedy=f"write eta 0, and a solver other than {', '.join(NOISY_SOLVERS)}",
        )
    if mine.architecture != theirs.architecture:
        raise EnvironmentFault(
            f"the skip plan was made for {theirs.model}, whose denoiser is built otherwise than that of {mine.model}",
            remedy=remedy,
        )
    if mine.prediction != theirs.prediction:
        raise EnvironmentFault(
            f"the learned solver was made for a model that predicts {theirs.prediction}; {mine.model} predicts"
            f" {prediction_of(family)}",
            remedy=remedy,
        )
    if mine.solver != theirs.solver:
        raise EnvironmentFault(
            f"the skip plan was made for the solver {theirs.solver}, not {mine.solver}",
            remedy=f"draw with {theirs.solver}, or {remedy}",
        )
    if theirs.multistep is not None and theirs.multistep.guidance and branches(family, settings) == 1:
        raise EnvironmentFault(
            "the learned solver says how much guidance each call gets, and here is none",
            remedy=f"draw with a guidance above 1 (it was made at {plan.made_by.get('guidance_scale')}), or {remedy}",
        )
    if mine.multistep != theirs.multistep:
        raise EnvironmentFault("the plan's steps are a learned solver's, and others are asked for", remedy=remedy)
    if (mine.num_inference_steps, mine.timesteps) != (theirs.num_inference_steps, theirs.timesteps):
        raise EnvironmentFault(
            f"the skip plan was made for {theirs.num_inference_steps} steps, not {mine.num_inference_steps}",
            remedy=f"draw with {theirs.num_inference_steps} steps, or {remedy}",
        )
    modules = family.skippable(plan.grain)
    calls = make_route(family, settings).calls
    if sorted(modules) != sorted(plan.wiring.units) or plan.calls != calls:
        raise EnvironmentFault(
            f"the skip plan has {plan.calls} calls of {len(plan.wiring.units)} units; "
            f"{mine.model} has {calls} calls of {len(modules)}",
            remedy=remedy,
        )
    return Skips(plan, modules, exact)


def other_weights(plan: SkipPlan, family: Family) -> str | None:
    """A sentence when the plan was made for other weights of the same architecture."""
    if plan.made_for.model == family.source:
        return None
    return (
        f"the skip plan was made for {plan.made_for.model}; it fits {family.source}, which is built alike, but what it "
        "costs there in quality was not measured"
    )
