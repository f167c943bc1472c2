"""A skip plan and its file: JSON, no pickle."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import write_text
from sdo_cli.installed import sdo
from sdo_cli.skipping.liveness import Wiring, live, read_later, stored_reads
from sdo_cli.skipping.multistep import Multistep, multistep_of

# a learned solver's file is of version 2: what reads version 1 alone would take its steps and leave the solver
FORMAT, VERSION, LEARNED_VERSION = "sdo-skip-plan", 1, 2
GRAINS = ("blocks", "parts")


@dataclass(frozen=True)
class MadeFor:
    """What a plan fits.

    Attributes:
        model: where the weights came from; another of the same architecture is only noted.
        architecture: fingerprint of the denoiser's config.
        solver, num_inference_steps: its calls are the plan's rows.
        timesteps: of the steps, where they are not the solver's own.
    multistep: how they are taken, where that was learned.
    prediction: what the network predicts, where it was.
    """

    model: str
    architecture: str
    solver: str
    num_inference_steps: int
    timesteps: tuple[int, ...] | None = None
    multistep: Multistep | None = None
    prediction: str | None = None


@dataclass(frozen=True)
class SkipPlan:
    """Attributes:
    runs: ``[calls, units]`` bool on the CPU: what is computed; everything else hands out its most recent output.
    grain: ``blocks`` or ``parts`` (their residual and attention layers).
    made_by: method and settings of the search.
    cost, quality: what was measured, by name.
    """

    made_for: MadeFor
    grain: str
    wiring: Wiring
    runs: Tensor
    made_by: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runs.dim() != 2 or self.runs.shape[1] != len(self.wiring.units):
            raise ValueError(f"runs {tuple(self.runs.shape)} must be [calls, {len(self.wiring.units)}]")
        if not bool(self.runs[0].all()):
            raise ValueError("the first call must compute everything: there is nothing to take instead")

    @property
    def calls(self) -> int:
        return self.runs.shape[0]

    @cached_property
    def repeats(self) -> tuple[bool, ...]:
        """Per call whether its output is the one before, so that the network is not called at all."""
        some = self.runs.any(1).tolist()
        return tuple(not computed and not self.wiring.inputs_reach_output for computed in some)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Per call the one whose output it has: a call may compute units for later readers alone."""
        found, output = list[int](), sorted(self.wiring.output)
        for i, row in enumerate(self.runs):
            own = self.wiring.inputs_reach_output or bool(row[output].any())
            found.append(i if own else found[-1])
        return tuple(found)

    @property
    def loses_gradients(self) -> bool:
        """An output is made anew of stored ones alone, which are data: a live call there has no gradient."""
        output = sorted(self.wiring.output)
        return self.wiring.inputs_reach_output and not bool(self.runs[:, output].any(1).all())

    @cached_property
    def reads(self) -> list[frozenset[int]]:
        """Per call the units whose stored output is read; a call that repeats reads none."""
        found = stored_reads(self.runs, self.wiring)
        return [frozenset() if repeated else read for repeated, read in zip(self.repeats, found, strict=True)]

    @cached_property
    def keeps(self) -> list[frozenset[str]]:
        """Per call the units whose output of then is read later."""
        return [frozenset(self.wiring.units[b] for b in kept) for kept in read_later(self.runs, self.reads)]

    @property
    def is_whole(self) -> bool:
        """Every call computes everything, or repeats."""
        return all(repeated or bool(row.all()) for repeated, row in zip(self.repeats, self.runs, strict=True))

    def with_measures(self, *, cost: dict[str, Any] | None = None, quality: dict[str, Any] | None = None) -> "SkipPlan":
        return replace(self, cost=self.cost | (cost or {}), quality=self.quality | (quality or {}))

    @property
    def fingerprint(self) -> str:
        """Of what is drawn with it; not of how it was found or measured."""
        return hashlib.sha256(json.dumps(self._drawn()).encode()).hexdigest()[:16]

    def _drawn(self) -> dict[str, Any]:
        made_for, wiring = self.made_for, self.wiring
        learned = {} if made_for.multistep is None else {"multistep": made_for.multistep.tree()}
        return {
            "architecture": made_for.architecture,
            "solver": made_for.solver,
            "num_inference_steps": made_for.num_inference_steps,
            "timesteps": None if made_for.timesteps is None else list(made_for.timesteps),
            "grain": self.grain,
            "units": list(wiring.units),
            "runs": ["".join("01"[computed] for computed in row) for row in self.runs.tolist()],
            **learned,
        }

    def tree(self) -> dict[str, Any]:
        wiring = self.wiring
        return {
            "format": FORMAT,
            "version": VERSION if self.made_for.multistep is None else LEARNED_VERSION,
            "model": self.made_for.model,
            **self._drawn(),
            **({} if self.made_for.prediction is None else {"prediction": self.made_for.prediction}),
            "wiring": {
                "reads": [sorted(read) for read in wiring.reads],
                "output": sorted(wiring.output),
                "inputs_reach_output": wiring.inputs_reach_output,
            },
            "made_by": self.made_by,
            "cost": self.cost,
            "quality": self.quality,
        }

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.tree(), indent=1, ensure_ascii=False) + "\n")


def plan_from_gates(
    gates: Tensor, made_for: MadeFor, grain: str, wiring: Wiring, made_by: dict[str, Any] | None = None
) -> SkipPlan:
    """The plan of ``gates [calls, units]``, with only what somebody reads."""
    return SkipPlan(made_for, grain, wiring, live(gates, wiring), made_by or {})


def load_plan(path: Path) -> SkipPlan:
    """Read a plan.

    Raises:
        EnvironmentFault: not there, or no such file.
    """
    remedy = f"make one with {sdo('prune')}"
    if not path.is_file():
        raise EnvironmentFault(f"there is no skip plan {path}", remedy=remedy)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as fault:
        raise EnvironmentFault(f"{path} is not a skip plan: it is no JSON ({fault})", remedy=remedy) from fault
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise EnvironmentFault(f'{path} is not a skip plan: it does not say "format": "{FORMAT}"', remedy=remedy)
    if tree.get("version") not in (VERSION, LEARNED_VERSION):
        raise EnvironmentFault(
            f"{path} is a skip plan of version {tree.get('version')}; this sdo reads {VERSION} and {LEARNED_VERSION}",
            remedy=f"make it again with {sdo('prune')}, or use the sdo that made it",
        )
    try:
        return _plan_of(tree)
    except (KeyError, TypeError, ValueError) as fault:
        raise EnvironmentFault(f"{path} is a damaged skip plan: {_said(fault)}", remedy=remedy) from fault


def _said(fault: Exception) -> str:
    return f"{fault.args[0]} is missing" if isinstance(fault, KeyError) else str(fault)


def _plan_of(tree: dict[str, Any]) -> SkipPlan:
    units, rows, wiring = tuple(tree["units"]), tree["runs"], tree["wiring"]
    wrong = [row for row in rows if len(row) != len(units) or set(row) - set("01")]
    if wrong or not rows:
        raise ValueError(f"runs must be lines of {len(units)} digits 0 or 1, one per network call")
    numbers = [*wiring["output"], *(number for read in wiring["reads"] for number in read)]
    if len(wiring["reads"]) != len(units) or not all(0 <= number < len(units) for number in numbers):
        raise ValueError(f"its wiring does not fit its {len(units)} units")
    if not all(number < b for b, read in enumerate(wiring["reads"]) for number in read):
        raise ValueError("its wiring has a unit read one that runs after it")
    if tree["grain"] not in GRAINS:
        raise ValueError(f"grain must be one of {', '.join(GRAINS)}, not {tree['grain']}")
    timesteps = tree["timesteps"]
    whole = [tree["num_inference_steps"], *(timesteps or ())]
    if not all(type(number) is int for number in whole) or (timesteps is not None and len(timesteps) != whole[0]):
        raise ValueError("num_inference_steps and timesteps must be whole numbers, as many of these as of those")
    made_for = MadeFor(
        tree["model"],
        tree["architecture"],
        tree["solver"],
        tree["num_inference_steps"],
        None if timesteps is None else tuple(timesteps),
        multistep_of(tree["multistep"]) if tree["version"] == LEARNED_VERSION else None,
        tree.get("prediction"),
    )
    if made_for.multistep is not None and (timesteps is None or made_for.multistep.calls != len(timesteps)):
        raise ValueError("its multistep has as many rows as there are timesteps")
    found = Wiring(
        units,
        tuple(frozenset(read) for read in wiring["reads"]),
        frozenset(wiring["output"]),
        bool(wiring["inputs_reach_output"]),
    )
    runs = torch.tensor([[digit == "1" for digit in row] for row in rows])
    return SkipPlan(made_for, tree["grain"], found, runs, tree["made_by"], tree["cost"], tree["quality"])
