"""Timesteps somebody chose, in place of those a solver would place itself."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import SolverFault

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# solvers that take them
TAKEN_BY = ("ddim", "euler", "ipndm", "dpm++2m", "ddpm", "lcm", "tcd", "flow-euler")

# how a scheduler would space its own steps; a flow solver's `shift` too only places steps: its timesteps are shifted
OWN_SPACING = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "shift": 1.0,
    "shift_terminal": None,
}


def with_timesteps(name: str, scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """The scheduler that takes timesteps for the solver ``name``, made from the solver's own.

    Raises:
        SolverFault: none does.
    """
    from diffusers import DPMSolverMultistepScheduler

    if name not in TAKEN_BY:
        raise SolverFault(f"solver {name!r} takes no timesteps", remedy=f"choose one of: {', '.join(TAKEN_BY)}")
    # diffusers' DDIM takes none, and first-order DPM-Solver++ is DDIM without noise (Lu et al. 2022, arXiv
    # 2206.00927, section 4.1)
    kind = DPMSolverMultistepScheduler if name == "ddim" else type(scheduler)
    takes = inspect.signature(kind).parameters
    settings = {key: value for key, value in OWN_SPACING.items() if key in takes}
    return kind.from_config(scheduler.config, **settings, **(first_order(scheduler.config) if name == "ddim" else {}))


def first_order(ddim: Mapping[str, Any]) -> dict[str, Any]:
    """What makes DPM-Solver++ the DDIM of this config."""
    last = "zero" if ddim.get("set_alpha_to_one", True) else "sigma_min"
    return {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": last}


def check_timesteps(timesteps: Sequence[int], num_inference_steps: int, scheduler: "SchedulerMixin") -> None:
    """Raises SolverFault for timesteps that are no way from noise to image."""
    # the noise of a flow at timestep t is t / 1000: none at 0, and nothing else at 1000
    flow = _is_flow(scheduler)
    first, last = scheduler.config.num_train_timesteps - 1 + flow, int(flow)
    wrong = ""
    if len(timesteps) != num_inference_steps or not timesteps:
        wrong = f"{len(timesteps)} timesteps for {num_inference_steps} steps"
    elif outside := [t for t in timesteps if t != int(t) or not last <= t <= first]:
        wrong = f"timestep {outside[0]} is no whole number from {first} to {last}"
    elif rising := [(a, b) for a, b in pairwise(timesteps) if a <= b]:
        wrong = f"timestep {rising[0][1]} comes after {rising[0][0]}"
    if wrong:
        raise SolverFault(wrong, remedy=f"give one per step, falling, between {first} and {last}")


def set_timesteps(
    scheduler: "SchedulerMixin", num_inference_steps: int, timesteps: Sequence[int] | None = None
) -> None:
    """Set a scheduler to its own timesteps, or to ``timesteps``.

    Raises:
        SolverFault: timesteps that are no way from noise to image, or a scheduler that takes none.
    """
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps)
        return
    takes = inspect.signature(scheduler.set_timesteps).parameters
    if "timesteps" not in takes:
        raise SolverFault(f"{type(scheduler).__name__} takes no timesteps", remedy="make it with make_scheduler")
    check_timesteps(timesteps, num_inference_steps, scheduler)
    if _is_flow(scheduler):
        # with timesteps alone diffusers would shift the noise levels and leave the timesteps as they are
        levels = [t / scheduler.config.num_train_timesteps for t in timesteps]
        scheduler.set_timesteps(sigmas=levels, timesteps=list(timesteps))
    else:
        scheduler.set_timesteps(timesteps=list(timesteps))


def _is_flow(scheduler: "SchedulerMixin") -> bool:
    return "FlowMatch" in type(scheduler).__name__


def whole_timesteps(scheduler: "SchedulerMixin") -> tuple[int, ...]:
    """The timesteps a scheduler is set to, rounded (those of flow and Euler solvers need not be whole)."""
    return tuple(int(t) for t in scheduler.timesteps.double().round().tolist())
