"""The stock diffusers schedulers that keep the affine identity, by name."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.scheduler_config import check_config, ignored_by, is_flow, is_said
from sdo_cli.sampling.timesteps import set_timesteps, with_timesteps
from sdo_cli.skipping.multistep import Multistep

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Solver:
    """A scheduler class of ``module`` and the settings that make it the solver of this name."""

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False  # for flow-matching networks; the others are for ε- and v-networks
    noisy: bool = False  # injects fresh noise whatever eta is
    module: str = "diffusers"


# a solver's name says how its steps are spaced; a model's config may want otherwise
PLAIN_SPACING = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}

SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler"),
    "pndm": Solver("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": Solver("EulerDiscreteScheduler", PLAIN_SPACING),
    "dpm++2m": Solver(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, **PLAIN_SPACING}
    ),
    "dpm++2m-karras": Solver(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **PLAIN_SPACING, "use_karras_sigmas": True},
    ),
    "unipc": Solver("UniPCMultistepScheduler"),
    # the config may be another solver's, whose algorithm it does not have
    "deis": Solver("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "ipndm": Solver("IPNDMSigmaScheduler", PLAIN_SPACING, module="sdo_cli.sampling.ipndm"),
    "ddpm": Solver("DDPMScheduler", {"variance_type": "fixed_small"}, noisy=True),
    "euler-a": Solver("EulerAncestralDiscreteScheduler", noisy=True),
    # for networks distilled into few steps (Luo et al. 2023, arXiv 2310.04378; Zheng et al. 2024, arXiv 2402.19159)
    "lcm": Solver("LCMScheduler", noisy=True),
    "tcd": Solver("TCDScheduler"),
    "flow-euler": Solver("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}, flow=True),
}

# stands for the model's own sampler, or what stands in for it (:func:`native_solver`)
AUTO = "auto"

# those whose noise has a level to choose, eta: DDIM's, and TCD's, which its authors call gamma
STOCHASTIC = ("ddim", "tcd")

NOISY_SOLVERS = tuple(name for name, solver in SOLVERS.items() if solver.noisy)

# networks are trained on 1,000 noise levels, and schedulers with an offset cannot use all of them
MOST_STEPS = 999

# Value-dependent steps: the final latent is then no affine function of the network's outputs.
BREAKS_IDENTITY = ("thresholding", "clip_sample")


def calls_of(solver: str, num_inference_steps: int) -> int:
    """Network calls of a trajectory: PNDM takes two for its first step."""
    return num_inference_steps + (solver == "pndm" and num_inference_steps > 1)


@dataclass(frozen=True)
class Native:
    """Attributes:
    solver: a key of ``SOLVERS``.
    instead_of: what the model's own scheduler does that ``solver`` does not; empty where it is the model's own.
    """

    solver: str
    instead_of: str = ""


def native_solver(config: Mapping[str, Any]) -> Native:
    """What ``auto`` stands for with this model: its own sampler, where that keeps the affine identity.

    Args:
        config: the model's scheduler config, of any diffusers class.
    """
    own = str(config.get("_class_name", ""))
    if is_flow(config):
        differs = [] if own == SOLVERS["flow-euler"].scheduler else [own]
        differs += [key for key in ("stochastic_sampling", *PLAIN_SPACING) if config.get(key)]
        return Native("flow-euler", " with ".join(differs))
    name = {solver.scheduler: name for name, solver in reversed(SOLVERS.items())}.get(own)
    if name is None:
        return Native("ddim", own)
    if name == "dpm++2m" and config.get("use_karras_sigmas"):
        name = "dpm++2m-karras"
    if ignored := ignored_by(_takes(name), config):
        return Native("ddim", f"{own}, which has no {ignored[0]}")
    # settings that the model's file names and the solver's name does not stand for
    other = {
        key: config[key]
        for key, value in SOLVERS[name].settings.items()
        if is_said(config, key) and config[key] != value
    }
    return Native(name, own + "".join(f" with {key} {value}" for key, value in other.items()) if other else "")


def scheduler_class(name: str) -> Any:
    """The class behind a solver's name."""
    return getattr(import_module(SOLVERS[name].module), SOLVERS[name].scheduler)


def _takes(name: str) -> Mapping[str, Any]:
    """The parameters of a solver's scheduler."""
    return inspect.signature(scheduler_class(name)).parameters


def make_scheduler(
    name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    timesteps: Sequence[int] | None = None,
    multistep: Multistep | None = None,
) -> "SchedulerMixin":
    """The stock scheduler, set to ``num_inference_steps``.

    Args:
        name: a key of ``SOLVERS``.
        config: the model's scheduler config, of any diffusers class. A missing ``clip_sample`` counts as False
            (Stable Diffusion's own configs leave it out; diffusers' default of True is wrong for latents).
        timesteps: training timesteps to step through in place of the solver's own, noisiest first, one per step.
        multistep: learned numbers for a step at each of these timesteps, in place of the solver's.

    Raises:
        SolverFault: unknown solver, wrong kind of network, a config that breaks the affine identity, or timesteps
            that the solver does not take.
    """
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
    check_config(config)
    flow = is_flow(config)
    if flow != solver.flow:
        kind = "a flow-matching" if flow else "an ε- or v-"
        fitting = ", ".join(key for key, value in SOLVERS.items() if value.flow == flow)
        raise SolverFault(f"solver {name!r} does not fit {kind} network", remedy=f"choose one of: {fitting}")
    if ignored := ignored_by(_takes(name), config):
        others = [key for key, value in SOLVERS.items() if value.flow == flow and not ignored_by(_takes(key), config)]
        raise SolverFault(
            f"solver {name!r} has no {ignored[0]}, which the model's scheduler config sets: it would draw from other"
            " noise levels than the model was trained on",
            remedy=f"choose one of: {', '.join(others)}",
        )
    try:
        scheduler = scheduler_class(name).from_config(dict(config), **settings_of(name, config))
        if timesteps is not None:
            scheduler = with_timesteps(name, scheduler)
            if multistep is not None:
                scheduler = with_numbers(scheduler, multistep)
        set_timesteps(scheduler, num_inference_steps, timesteps)
    # what diffusers says of settings that do not go together, or not with so many steps
    except (NotImplementedError, ValueError, IndexError, ZeroDivisionError) as fault:
        raise SolverFault(
            f"solver {name!r} does not work with {num_inference_steps} steps and the model's scheduler config:"
            f" {' '.join(str(fault).split())}",
            remedy="choose another solver or number of steps",
        ) from fault
    return scheduler


def with_numbers(scheduler: "SchedulerMixin", multistep: Multistep) -> "SchedulerMixin":
    """The learned solver on the noise levels of this one, which takes timesteps."""
    from sdo_cli.sampling.learned import LearnedFlowMatchScheduler, LearnedMultistepScheduler

    kind: Any = LearnedFlowMatchScheduler if is_flow(scheduler.config) else LearnedMultistepScheduler
    return kind.from_config(scheduler.config, multistep=multistep.tree())


def settings_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a diffusers scheduler, whatever the model's config says or leaves out, the solver ``name``."""
    settings, takes = dict(SOLVERS[name].settings), _takes(name)
    if "clip_sample" in takes:
        settings["clip_sample"] = False
    # multistep solvers call the shift of a flow otherwise
    if "shift" in takes and is_said(config, "flow_shift") and not is_said(config, "shift"):
        settings["shift"] = config["flow_shift"]
    # what a version of diffusers does not know yet
    return {key: value for key, value in settings.items() if key in takes}
