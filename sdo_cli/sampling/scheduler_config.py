"""A model's scheduler config: what its file says, apart from what diffusers filled in, and what it cannot mean.

diffusers lists the keys that it filled in (``_use_default_values``), and every ``from_config`` drops those again, so
that another scheduler takes its own defaults. Changing a value alone is therefore forgotten, and writing all keys into
a file turns one scheduler's defaults into every other's settings.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdo_cli.errors import SolverFault

_FILLED_IN = "_use_default_values"
CONFIG_FILE = "scheduler_config.json"
# what the network was trained on: no solver may put something else in its place
TRAINED_ON = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def saying(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The config with ``settings`` said: no default that a scheduler may replace."""
    filled_in = [key for key in config.get(_FILLED_IN, ()) if key not in settings]
    return {**config, **settings, _FILLED_IN: filled_in}


def is_said(config: Mapping[str, Any], key: str) -> bool:
    """Whether the model's file names ``key``."""
    return key in config and key not in config.get(_FILLED_IN, ())


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the model's file names."""
    return {key: value for key, value in config.items() if key != _FILLED_IN and is_said(config, key)}


def write_said(config: Mapping[str, Any], folder: Path) -> None:
    """Replace the scheduler's config in a saved pipeline by the keys that the model's own file names.

    Whoever loads it, with whichever scheduler, has the timesteps of the model it was made from.
    """
    place = folder / "scheduler" / CONFIG_FILE
    saved = json.loads(place.read_text(encoding="utf-8"))
    kept = {key: value for key, value in saved.items() if key.startswith("_") or is_said(config, key)}
    place.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config belongs to a flow-matching network."""
    return "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction"


def check_config(config: Mapping[str, Any]) -> None:
    """Raises SolverFault for a config that no solver here can follow."""
    name = str(config.get("_class_name", ""))
    if name.startswith("EDM"):
        raise SolverFault(
            f"the model's scheduler is {name}: it was trained in EDM's scaling (sigma_data), which sdo does not serve",
            remedy="use a model trained to predict ε, v or a flow",
        )
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise SolverFault(
            "the model's scheduler config sets rescale_betas_zero_snr with prediction_type epsilon: at zero"
            " signal-to-noise ratio, a prediction of the noise says nothing about the image",
            remedy="set prediction_type: v_prediction if that is what the model was trained for, or"
            " rescale_betas_zero_snr: false",
        )
    if config.get("use_dynamic_shifting"):
        raise SolverFault(
            "the model's scheduler config sets use_dynamic_shifting, whose steps depend on the image size",
            remedy="set it to false, and shift to the value you want, in scheduler/scheduler_config.json",
        )


def ignored_by(takes: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What the network was trained on that a scheduler has no setting for.

    Args:
        takes: the parameters of the scheduler's constructor.
    """
    return [key for key in TRAINED_ON if key not in takes and is_said(config, key) and config[key] not in (None, False)]
