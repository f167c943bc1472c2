"""Checkpoints: complete or not there. Tensors in safetensors, the rest in JSON, a marker with the hash of every file.

``checkpoints/checkpoint-50/`` holds ``state.safetensors`` (trained weights, optimizer, running mean, random states),
``state.json`` (position, rate, scaler, what the run is) and ``complete.json``. It is written under another name, the
marker last, and renamed; what has no valid marker is never read. Beside them lies the adapter as it would be kept if
training ended there, to draw with; it stays when the state is forgotten.
"""

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdo_cli.errors import CheckpointFault
from sdo_cli.files import as_others, read_json, write_json
from sdo_cli.models.lora_paths import CHECKPOINTS, checkpoint_folder, step_of
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.parallel.shards import whole
from sdo_cli.parallel.world import SINGLE, World

MARKER = "complete.json"
FILES = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    step: optimizer steps taken before it.
    run: what the run was, to refuse another one.
    """

    folder: Path
    step: int
    run: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    run_folder: Path,
    step: int,
    stepper: Stepper,
    run: dict[str, Any],
    *,
    keep: int,
    guard: dict[str, Any] | None = None,
    replays: dict[str, Any] | None = None,
    world: World = SINGLE,
    adapter: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``checkpoint-<step>``; remove older ones beyond ``keep`` (0 keeps all), never the newest complete one.

    Every process calls it and adds its random state, and its part of what is dealt out; the first one writes.

    Args:
        adapter: writes the trained LoRA into a folder.
    """
    target = checkpoint_folder(run_folder, step)
    random_states = world.gather(_random_state())

    def is_wanted() -> bool:
        return _fault_of(target) is not None

    if not (world.share(is_wanted) if world.dealt_out else world.is_main and is_wanted()):
        return target
    # whole ones, or what is put together later
    tensors: dict[str, Any] = {}
    parts = {"stepper": stepper.state(), "random": random_states, "guard": guard, "replays": replays}
    state = split(parts, tensors, "")
    copies = {}
    for name, tensor in tensors.items():
        # one after the other: no process holds all of them on its device
        full = whole(tensor.detach())
        if world.is_main:
            # contiguous copies: safetensors refuses memory that is shared
            copies[name] = full.cpu().contiguous().clone()
    if not world.is_main:
        return target
    staged = target.with_name(f".partial-{target.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if adapter is not None:
        adapter(staged)
    save_file(copies, staged / FILES[0])
    as_others(staged / FILES[0])
    write_json(staged / FILES[1], {"step": step, "run": run, "state": state})
    write_json(staged / MARKER, {"step": step, "files": {name: _describe(staged / name) for name in FILES}})
    # one of that name that is damaged
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    _forget_older(run_folder, keep)
    return target


def newest(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a sentence for every newer one that is damaged."""
    damaged: list[str] = []
    for folder in sorted(_all(run_folder), key=_step_of, reverse=True):
        fault = _fault_of(folder)
        if fault is None:
            return _read(folder), damaged
        damaged.append(f"{folder}: {fault}")
    return None, damaged


def restore(checkpoint: Checkpoint, stepper: Stepper, *, rank: int = 0) -> dict[str, Any]:
    """Put everything back into the optimizer, its parameters and this process's random generators.

    Returns:
        What others have to put back: ``guard`` and ``replays``, None each if there was none.

    Raises:
        CheckpointFault: made with other parameters.
    """
    state = join(checkpoint.state, checkpoint.tensors)
    try:
        stepper.load_state(state["stepper"])
    except (KeyError, ValueError, RuntimeError) as fault:
        raise CheckpointFault(
            f"{checkpoint.folder} does not fit this run: {str(fault).strip().splitlines()[0]}",
            remedy="start a new run, or resume with the recipe it was made with",
        ) from fault
    if rank < len(state["random"]):
        _set_random_state(state["random"][rank])
    return {"guard": state["guard"], "replays": state.get("replays")}


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``.

    Raises:
        CheckpointFault: this process does not see it whole.
    """
    if (fault := _fault_of(folder)) is not None:
        raise CheckpointFault(f"{folder} {fault}", remedy="the run folder must be on a disk that all processes share")
    return _read(folder)


def _all(run_folder: Path) -> list[Path]:
    return [path for path in (run_folder / CHECKPOINTS).glob("checkpoint-*") if step_of(path) is not None]


def _step_of(folder: Path) -> int:
    step = step_of(folder)
    return -1 if step is None else step


def _forget_older(run_folder: Path, keep: int) -> None:
    complete = [folder for folder in sorted(_all(run_folder), key=_step_of) if _fault_of(folder, quick=True) is None]
    for folder in complete[:-keep] if keep > 0 else []:
        # the marker first: half a checkpoint must not look whole
        (folder / MARKER).unlink()
        for name in FILES:
            (folder / name).unlink()
        if not any(folder.glob("*.safetensors")):
            shutil.rmtree(folder)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _fault_of(folder: Path, *, quick: bool = False) -> str | None:
    """Why a checkpoint cannot be used, None for a complete one; ``quick`` looks at sizes only."""
    if not folder.is_dir():
        return "is not there"
    try:
        marker = read_json(folder / MARKER)
        files = marker["files"]
        if set(files) != set(FILES) or marker["step"] != _step_of(folder):
            return f"{MARKER} is not of this checkpoint"
        for name, described in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != described["size"] or (not quick and _describe(path) != described):
                return f"{name} is damaged"
    except FileNotFoundError:
        return "is not complete"
    except (ValueError, KeyError, TypeError, OSError, AttributeError):
        return f"{MARKER} is damaged"
    return None


def _read(folder: Path) -> Checkpoint:
    tree = read_json(folder / FILES[1])
    return Checkpoint(folder, tree["step"], tree["run"], load_file(folder / FILES[0]), tree["state"])


def split(tree: Any, tensors: dict[str, Any], place: str) -> Any:
    """``tree`` as JSON: tensors go into ``tensors`` and leave their name; keys that are numbers are kept as such."""
    if isinstance(tree, Tensor) or hasattr(tree, "full_tensor"):
        tensors[place] = tree
        return {"tensor": place}
    if isinstance(tree, dict):
        items = [[key, split(value, tensors, f"{place}/{key}")] for key, value in tree.items()]
        return {"dict": items}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [split(value, tensors, f"{place}/{i}") for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{place} is a {type(tree).__name__}, which a checkpoint cannot hold")


def join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: join(inner, tensors) for key, inner in value}
    found = [join(inner, tensors) for inner in value]
    return tuple(found) if kind == "tuple" else found


def _random_state() -> dict[str, Any]:
    """Of the global generators: sdo keys its own draws, but a reward of a plug-in may use these."""
    name, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(v) for v in rest)),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
