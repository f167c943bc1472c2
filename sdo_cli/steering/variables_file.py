"""The optimised variables as one safetensors file that says by itself how its images are drawn."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.files import write_atomic
from sdo_cli.models.lora_stack import Stacked, stack_of
from sdo_cli.recipe.document import Document
from sdo_cli.recipe.schema import PromptSource
from sdo_cli.recipe.steering_schema import Steering
from sdo_cli.recipe.typed import Reader
from sdo_cli.steering.variables import State, sample_dim

FORMAT = "sdo-variables-1"


@dataclass(frozen=True)
class Saved:
    """Attributes:
    prompts: of every image.
    encoded: all that were encoded together, also those whose images were not come to.
    tensors: of all images; embeddings only where they were a variable.
    """

    spec: Steering
    prompts: list[str]
    encoded: list[str]
    tensors: dict[str, Tensor]

    def state(self, which: range, state: State) -> State:
        """``state`` of these images with what the file holds of them."""
        rows = torch.tensor(list(which))
        return state.with_tensors(
            {
                name: value.index_select(sample_dim(name), rows).to(state.latent.device)
                for name, value in self.tensors.items()
            }
        )


def save_variables(
    path: Path, spec: Steering, prompts: list[str], encoded: list[str], states: list[dict[str, Tensor]]
) -> None:
    """Latents, scales and noise, which make an image, and embeddings where they are variables.

    Args:
        states: of every group of images what :meth:`State.tensors` gives, on the CPU.
    """
    embedding = any(name.startswith("embedding") for name in spec.variables)
    names = [name for name in states[0] if embedding or not name.startswith("embedding")]
    tensors = {name: torch.cat([state[name] for state in states], sample_dim(name)).contiguous() for name in names}
    settings = {**asdict(spec), **{key: whole_path(getattr(spec, key)) for key in ("model", "vae")}}
    settings["lora"] = whole_lora(spec.lora)
    words = {"prompts": prompts, "encoded": encoded}
    note = {"format": FORMAT, "settings": json.dumps(settings)}
    note |= {name: json.dumps(lines, ensure_ascii=False) for name, lines in words.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=note))


def whole_path(path: str | None) -> str | None:
    """A path that is found from any folder; names stay names."""
    return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path


def whole_lora(text: str | None) -> str | None:
    """The same of every LoRA in ``a:0.8+b``."""
    if text is None:
        return None
    return "+".join(str(Stacked(whole_path(one.path) or "", one.scale)) for one in stack_of(text))


def read_variables(path: Path) -> Saved:
    """Raises EnvironmentFault for anything but a whole file of `sdo optimize`."""
    remedy = "give the variables.safetensors of an `sdo optimize` folder"
    if path.is_dir():
        path = path / "variables.safetensors"
    try:
        with safe_open(path, "pt") as file:
            note: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise EnvironmentFault(f"cannot read {path}: {fault}", remedy=remedy) from fault
    if note.get("format") != FORMAT:
        raise EnvironmentFault(f"{path} holds no variables of images", remedy=remedy)
    try:
        spec = _settings(json.loads(note["settings"]))
        prompts, encoded = ([str(p) for p in json.loads(note[name])] for name in ("prompts", "encoded"))
    except (KeyError, ValueError, RecipeFault) as fault:
        raise EnvironmentFault(f"{path} is of another version of sdo: {fault}", remedy="optimise again") from fault
    if any(value.shape[sample_dim(name)] != len(prompts) for name, value in tensors.items()) or "latent" not in tensors:
        raise EnvironmentFault(f"{path} does not hold what it says", remedy="optimise again")
    return Saved(spec, prompts, encoded, tensors)


def _settings(tree: dict[str, Any]) -> Steering:
    document = Document(tree={**tree, "prompts": asdict(PromptSource(lines=["-"]))}, origins={(): "settings"})
    spec: Steering = Reader(document).read(document.tree, Steering, ())
    if document.problems:
        raise RecipeFault(document.problems)
    return spec
