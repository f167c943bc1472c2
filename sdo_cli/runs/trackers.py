"""Experiment trackers, through accelerate and only if the recipe asks: tensorboard, wandb, trackio and others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdo_cli.errors import EnvironmentFault, first_line
from sdo_cli.installed import install

# of the registry, where it is not the tracker's own name
PACKAGES = {"comet_ml": "comet-ml"}


class Trackers:
    """Those of one run; does nothing without names.

    Args:
        names: accelerate's, see ``sdo_cli.recipe.check.TRACKERS``.
        settings: of the run, by dotted key.

    Raises:
        EnvironmentFault: a package is missing, or a tracker could not be started.
    """

    def __init__(self, names: list[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._accelerator: Any = None
        if not names:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
        if missing := [name for name in names if name not in there]:
            line = install(*(PACKAGES.get(name, name) for name in missing))
            raise EnvironmentFault(
                f"trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
                remedy=f"{line}, or leave it out: metrics.jsonl and report.html are always written",
            )
        flat = {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in settings.items()}
        try:
            self._accelerator = Accelerator(log_with=names, project_dir=str(folder))
            # the run's own name, where the tracker has one; tensorboard writes to this folder of the run's
            self._accelerator.init_trackers(
                "tracking", config=flat, init_kwargs={name: {"name": folder.name} for name in names if name == "wandb"}
            )
        # whatever a service's client raises
        except Exception as fault:
            raise EnvironmentFault(
                f"trackers: cannot start {', '.join(names)}: {first_line(fault)}",
                remedy="sign in as its documentation says, or leave it out of the recipe",
            ) from fault

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers of one step; those that are not known are left out."""
        if self._accelerator is not None:
            self._accelerator.log({name: v for name, v in values.items() if v is not None and v == v}, step=step)

    def end(self) -> None:
        # end_training() would also take the process group away, which the others still need
        for tracker in self._accelerator.trackers if self._accelerator is not None else ():
            tracker.finish()
