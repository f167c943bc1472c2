"""What a job has finished, in its folder, piece by piece, so that it can go on; and whether the folder is this job's.

``kept/<piece>.safetensors`` holds tensors, in its header everything else as JSON and the hash of both. It is written
under another name and renamed; one that is damaged counts as missing. What the job is stands under ``identity`` in its
``manifest.json``. Once the job is finished its pieces are removed: the folder's own files say all of it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdo_cli.errors import RecipeFault
from sdo_cli.files import file_hash, write_atomic
from sdo_cli.models.lora_files import lora_hash
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.runs.checkpoint import join, split
from sdo_cli.runs.read import manifest_of
from sdo_cli.runs.resume import digest_of, flat
from sdo_cli.scoring.rewards import sources

FOLDER = "kept"


@dataclass(frozen=True)
class Kept:
    """The finished pieces of the job in ``folder``, by name."""

    folder: Path

    def put(self, name: str, tree: Any) -> None:
        """Tensors, numbers, words, lists, tuples and dicts of them."""
        found: dict[str, Tensor] = {}
        words = json.dumps(split(tree, found, ""))
        # contiguous copies: safetensors refuses memory that is shared
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}
        told = {"tree": words, "sha256": _hash(words, tensors)}
        write_atomic(self._path(name), lambda temporary: save_file(tensors, temporary, metadata=told))

    def get(self, name: str) -> Any:
        """The same again; None where it is missing or damaged."""
        try:
            with safe_open(self._path(name), "pt") as file:
                told, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if told.get("sha256") != _hash(told.get("tree", ""), tensors):
            return None
        return join(json.loads(told["tree"]), tensors)

    def clear(self) -> None:
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / FOLDER / f"{name}.safetensors"


def _hash(words: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def identity_of(
    tree: Mapping[str, Any], prompts: Mapping[str, list[str]], rewards: list[RewardSpec], files: Mapping[str, Any]
) -> dict[str, Any]:
    """What a job is, by dotted key: its settings, and what stands in the files that they name.

    Args:
        tree: the settings, without prompts.
        rewards: known by their code and files too.
        files: paths by the key they are told under, and under ``lora`` one as `--lora` takes it; None for none.
    """
    found = {**dict(flat(dict(tree), "")), **{key: digest_of(lines) for key, lines in prompts.items()}}
    found["contents"] = {
        **{key: _content(key, path) for key, path in files.items() if path},
        **{f"{spec.name}.{key}": value for spec in rewards for key, value in sources(spec.name, spec.options).items()},
    }
    # as it is read back
    return dict(json.loads(json.dumps(dict(flat(found, "")))))


def _content(key: str, path: Any) -> str | None:
    if key == "lora":
        return lora_hash(str(path))
    return file_hash(Path(path)) if Path(path).is_file() else str(path)


def status_in(folder: Path, identity: Mapping[str, Any]) -> str:
    """The status of the job in ``folder``; empty where nothing is in it.

    Raises:
        RecipeFault: it holds another job, told key by key, or something else.
    """
    # locks and what was being written begin with a dot
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return ""
    manifest = manifest_of(folder)
    if not isinstance(there := manifest.get("identity"), dict):
        raise RecipeFault([f"--out {folder}: holds no job to go on with; give another folder"], what="command line")
    if changed := [key for key in dict.fromkeys([*there, *identity]) if there.get(key) != identity.get(key)]:
        lines = [f"{key}: {json.dumps(there.get(key))} there, {json.dumps(identity.get(key))} here" for key in changed]
        raise RecipeFault(lines, what=f"command line: {folder} holds another job")
    return str(manifest["status"])
