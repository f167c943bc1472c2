"""Rewards by name, what they are made of, and scoring many images in batches."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewards
from rewards.base import LatentSpace, Reward
from sdo_cli.plugins import loaded_plugins


def build_reward(
    name: str, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.float32
) -> Reward:
    """The reward called ``name``, on ``device``; raises KeyError for an unknown one."""
    reward = rewards.build(name, options)
    if hasattr(reward, "to"):
        reward.to(device, dtype)
    return reward


def try_gradient(name: str, reward: Reward, prompt: str, device: torch.device, size: int = 64) -> None:
    """Score one plain picture with a plug-in's reward: one that gives no gradient is found before anything is drawn.

    Raises:
        PluginFault: it has none, or fails.
    """
    if rewards.full_name(name) not in rewards.FOREIGN:
        return
    # what it draws at random is not missing later
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        shape = (3, size, size)
        if reward.info.sees == "latent":
            space: LatentSpace = reward.latents  # type: ignore[attr-defined]
            shape = (space.channels, size // space.factor, size // space.factor)
        reward.score(torch.full((1, *shape), 0.5, device=device, requires_grad=True), [prompt])


def sources(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What a known reward's scores hang on beside its options: SHA-256 of a plug-in's code under ``code``, and for each
    option that names a local file or folder a digest of names, sizes and times, under the option.

    Weights may have gigabytes, so they are not read for it.
    """
    found = {"code": code} if (code := _code(name)) else {}
    for option, value in options.items():
        if option == "parts" and isinstance(value, list):
            for number, part in enumerate(value):
                inner = sources(part["name"], part.get("options") or {})
                found |= {f"parts.{number}.{key}": digest for key, digest in inner.items()}
        elif isinstance(value, str) and value and not value.startswith("embedded"):
            path = Path(value).expanduser()
            if path.exists():
                found[option] = _of_files(path)
    return found


def _code(name: str) -> str:
    """Of the file that holds the class of a plug-in's reward; empty for those of the package."""
    if not rewards.resolve(name) or (full := rewards.full_name(name)) not in rewards.FOREIGN:
        return ""
    file = getattr(sys.modules.get(rewards.FOREIGN[full].make.__module__), "__file__", None)
    if file is None:
        return ""
    path = Path(file).resolve()
    # as it was when it was run
    known = {plugin.path: plugin.sha256 for plugin in loaded_plugins()}
    return known.get(str(path)) or hashlib.sha256(path.read_bytes()).hexdigest()


def _of_files(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def reading_notes(built: Mapping[str, Reward], prompts: Iterable[str]) -> list[str]:
    """A sentence for every reward, by name, that does not read some prompts to their end."""
    every, found = list(dict.fromkeys(prompts)), []
    for name, reward in built.items():
        limit, longer = reward.unread(every) if hasattr(reward, "unread") else (0, [])
        if longer:
            line = " ".join(longer[0].split())
            shown = line if len(line) <= 40 else f"{line[:40]}…"
            found.append(
                f"{len(longer)} of {len(every)} prompts: {name} reads {limit} tokens and not what follows; "
                f"the first: {shown}"
            )
    return found


@torch.no_grad()
def score_images(reward: Reward, images: Tensor, prompts: list[str], *, batch_size: int = 64) -> Tensor:
    """Scores ``[B]`` on the CPU of images ``[B, 3, H, W]``."""
    parts = [
        reward.score(images[start : start + batch_size], prompts[start : start + batch_size]).float().cpu()
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)
