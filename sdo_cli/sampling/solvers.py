"""The stock diffusers schedulers that keep the affine identity, by name."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.timesteps import set_timesteps, with_timesteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Solver:
    """A scheduler class and the settings that make it the solver of this name."""

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False  # for flow-matching networks; the others are for ε- and v-networks


SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler"),
    "pndm": Solver("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": Solver("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "dpm++2m": Solver(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    "dpm++2m-karras": Solver(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "unipc": Solver("UniPCMultistepScheduler"),
    "deis": Solver("DEISMultistepScheduler"),
    "flow-euler": Solver("FlowMatchEulerDiscreteScheduler", flow=True),
}

# stands for the model's own kind: DDIM for ε- and v-networks, Euler for flow matching
AUTO = "auto"

# only DDIM has a noise level of its own to choose
STOCHASTIC = ("ddim",)

# networks are trained on 1,000 noise levels, and schedulers with an offset cannot use all of them
MOST_STEPS = 999

# Value-dependent steps: the final latent is then no affine function of the network's outputs.
BREAKS_IDENTITY = ("thresholding", "clip_sample")


def calls_of(solver: str, num_inference_steps: int) -> int:
    """Network calls of a trajectory: PNDM takes two for its first step."""
    return num_inference_steps + (solver == "pndm" and num_inference_steps > 1)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config belongs to a flow-matching network."""
    return "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction"


def native_solver(config: Mapping[str, Any]) -> str:
    """What ``auto`` stands for with this model."""
    return "flow-euler" if is_flow(config) else "ddim"


def make_scheduler(
    name: str, config: Mapping[str, Any], num_inference_steps: int, timesteps: Sequence[int] | None = None
) -> "SchedulerMixin":
    """The stock scheduler, set to ``num_inference_steps``.

    Args:
        name: a key of ``SOLVERS``.
        config: the model's scheduler config, of any diffusers class. A missing ``clip_sample`` counts as False
            (Stable Diffusion's own configs leave it out; diffusers' default of True is wrong for latents).
        timesteps: training timesteps to step through in place of the solver's own, noisiest first, one per step.

    Raises:
        SolverFault: unknown solver, wrong kind of network, a config that breaks the affine identity, or timesteps
            that the solver does not take.
    """
    import diffusers

    if name not in SOLVERS:
        raise SolverFault(f"unknown solver {name!r}", remedy=f"choose one of: {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    # diffusers fills defaults in when it reads a config and lists which; those the model did not ask for
    defaults = config.get("_use_default_values", ())
    set_on = [key for key in BREAKS_IDENTITY if config.get(key) and key not in defaults]
    if set_on:
        raise SolverFault(
            f"the model's scheduler config sets {' and '.join(set_on)}, which makes steps depend on the values",
            remedy="set it to false in scheduler/scheduler_config.json",
        )
    flow = is_flow(config)
    if flow != solver.flow:
        kind = "a flow-matching" if flow else "an ε- or v-"
        fitting = ", ".join(key for key, value in SOLVERS.items() if value.flow == flow)
        raise SolverFault(f"solver {name!r} does not fit {kind} network", remedy=f"choose one of: {fitting}")
    if flow and config.get("use_dynamic_shifting"):
        raise SolverFault(
            "the model's scheduler config sets use_dynamic_shifting, whose steps depend on the image size",
            remedy="set it to false, and shift to the value you want, in scheduler/scheduler_config.json",
        )
    scheduler = getattr(diffusers, solver.scheduler).from_config(dict(config), **settings_of(name))
    if timesteps is not None:
        scheduler = with_timesteps(name, scheduler)
    set_timesteps(scheduler, num_inference_steps, timesteps)
    return scheduler


def settings_of(name: str) -> dict[str, Any]:
    """What makes a diffusers scheduler, whatever the model's config leaves out, the solver ``name``."""
    import diffusers

    solver = SOLVERS[name]
    takes = inspect.signature(getattr(diffusers, solver.scheduler)).parameters
    return {**solver.settings, **({"clip_sample": False} if "clip_sample" in takes else {})}
