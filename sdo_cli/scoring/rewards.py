"""Rewards by name, and scoring many images in batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import rewards
from rewards.base import Reward


def build_reward(
    name: str, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.float32
) -> Reward:
    """The reward called ``name``, on ``device``; raises KeyError for an unknown one."""
    reward = rewards.build(name, options)
    if hasattr(reward, "to"):
        reward.to(device, dtype)
    return reward


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
