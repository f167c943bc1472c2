"""What a single checkpoint file says of itself beside its weights: markers among its tensors, and its metadata.

ComfyUI and Forge write and read empty tensors as markers (``v_pred``, ``ztsnr``, ``edm_…``); trainers and ComfyUI write
metadata (``modelspec.…``, ``ss_…``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdo_cli.errors import EnvironmentFault

# Playground v2.5; CosXL
EDM = (("edm_mean", "edm_std"), ("edm_vpred.sigma_max",))
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# of sd-scripts and the public specification; of ComfyUI
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
# training steps of SD 2's base model, which predicts ε; the others of its shape predict v
BASE_STEPS = 875_000


@dataclass(frozen=True)
class Header:
    """Attributes:
    shapes: of every tensor, by its original name.
    types: likewise, as safetensors calls them.
    metadata: the file's own.
    steps: the training steps it counts, if it does.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    steps: int | None = None

    @property
    def prediction_type(self) -> str | None:
        """``epsilon`` or ``v_prediction``, if the file says so; markers, which programs draw by, before metadata."""
        if "v_pred" in self.shapes:
            return "v_prediction"
        for key in PREDICTION_KEYS:
            if found := PREDICTIONS.get(self.metadata.get(key, "").lower()):
                return found
        if _is_true(self.metadata.get("ss_v_parameterization")):
            return "v_prediction"
        if self.metadata.get("modelspec.architecture", "").endswith("-768-v"):
            return "v_prediction"
        return "epsilon" if self.steps == BASE_STEPS else None

    @property
    def rescale_betas_zero_snr(self) -> bool | None:
        """True where the file says that it was trained with zero terminal SNR."""
        return True if "ztsnr" in self.shapes or _is_true(self.metadata.get("ss_zero_terminal_snr")) else None

    def scheduler_settings(self) -> dict[str, Any]:
        """What the file says in place of the scheduler config of its kind."""
        said = {
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
        }
        return {key: value for key, value in said.items() if value is not None}

    def contradictions(self) -> list[str]:
        """A sentence where marker and metadata do not agree."""
        told = {key: PREDICTIONS.get(self.metadata.get(key, "").lower()) for key in PREDICTION_KEYS}
        return [
            f"the file's marker v_pred says v_prediction, its metadata {key} {value}: the marker counts"
            for key, value in told.items()
            if "v_pred" in self.shapes and value == "epsilon"
        ][:1]

    def check(self) -> None:
        """Raises EnvironmentFault for what would be drawn wrongly."""
        if any(all(marker in self.shapes for marker in markers) for markers in EDM):
            raise EnvironmentFault(
                f"{self.path} is an EDM model (marker {next(n for n in self.shapes if n.startswith('edm_'))}), trained"
                " in another scaling of noise, which sdo does not serve",
                remedy="use a model trained to predict ε, v or a flow",
            )
        scaled = [name for name in self.shapes if name.endswith((".scale_weight", ".weight_scale"))]
        if scaled or "scaled_fp8" in self.shapes:
            raise EnvironmentFault(
                f"{self.path} holds scaled fp8 weights ({scaled[0] if scaled else 'scaled_fp8'}), which have to be"
                " multiplied out first",
                remedy="use the fp16 or bf16 file of the same model",
            )


def read_header(path: Path) -> Header:
    """The header of a ``.safetensors`` file; of its tensors only a step counter is read.

    Raises:
        EnvironmentFault: another kind of file, or one that was cut short.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise EnvironmentFault(
            f"{path} is no .safetensors file", remedy="convert it first: a .ckpt is a pickle, which can run any code"
        )
    try:
        with safe_open(path, "pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            types = {name: str(part.get_dtype()) for name, part in parts.items()}
            counter = stream.get_tensor("global_step") if shapes.get("global_step", (0, 0)) in ((), (1,)) else None
            steps = None if counter is None else int(counter.item())
            return Header(path, shapes, types, stream.metadata() or {}, steps)
    except (SafetensorError, OSError) as fault:
        raise EnvironmentFault(f"{path} is no safetensors file, or was cut short", remedy="copy it again") from fault


def _is_true(text: str | None) -> bool:
    return str(text).lower() == "true"
