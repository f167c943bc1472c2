"""Rewards of plug-ins, held to the contract while they run: what breaks it is said to be the plug-in's."""

from typing import Any

import torch
from torch import Tensor

from rewards import Foreign
from rewards.base import RewardInfo
from sdo_cli.errors import PluginFault

HINT = "run `sdo reward check` on it, or with --debug to see where"


class Guarded:
    """A plug-in's reward that answers as the contract says, or says what it did instead."""

    def __init__(self, name: str, foreign: Foreign, made: Any) -> None:
        self.name, self.made, self.differentiable = name, made, foreign.differentiable
        self.info = RewardInfo(
            name,
            foreign.summary,
            foreign.source,
            foreign.licence,
            foreign.range,
            differentiable=foreign.differentiable,
            trainable=foreign.differentiable,
        )

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Guarded":
        if hasattr(self.made, "to"):
            try:
                self.made.to(device, dtype)
            except Exception as fault:
                raise self._fault(f"failed in to(device, dtype): {_said(fault)}") from fault
        return self

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        try:
            scores = self.made.score(images, prompts)
        # foreign code may raise anything; memory is the boundary's to explain
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:
            raise self._fault(f"failed: {_said(fault)}") from fault
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = f"a tensor of {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise self._fault(f"returned {got}, not one score per image ({len(images)},)")
        if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise self._fault("returned scores without a gradient: it detached the images")
        return scores

    def _fault(self, text: str) -> PluginFault:
        return PluginFault(f"the plug-in's reward {self.name} {text}", remedy=HINT)


def _said(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}"


def guarded(name: str, foreign: Foreign, options: dict[str, Any]) -> Guarded:
    """Make the reward; raises PluginFault when its constructor fails."""
    try:
        return Guarded(name, foreign, foreign.make(**options))
    except Exception as fault:
        raise PluginFault(f"the plug-in's reward {name} cannot be made: {_said(fault)}", remedy=HINT) from fault
