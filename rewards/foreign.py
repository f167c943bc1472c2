"""Rewards of plug-ins, held to the contract while they run: what breaks it is said to be the plug-in's."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rewards.base import LatentSpace, RewardInfo
from rewards.registered import Foreign
from sdo_cli.errors import PluginFault
from sdo_cli.installed import sdo
from sdo_cli.plugins import PLUGIN_MODULE

# what a reward may have beside `score` (rewards/base.py)
EXTRAS = ("to", "gradient_checkpointing")


def _check(name: str, foreign: Foreign) -> str:
    """What is typed to try the reward alone."""
    module = getattr(foreign.make, "__module__", None) or ""
    # of a file that was given; installed packages are found by name
    file = getattr(sys.modules.get(module), "__file__", None) if module.startswith(PLUGIN_MODULE) else None
    return sdo("reward", "check", name, *(["--plugin", file] if file else []))


def _hint(name: str, foreign: Foreign) -> str:
    return f"try it alone: `{_check(name, foreign)}`; --debug shows where"


def info_of(name: str, foreign: Foreign) -> RewardInfo:
    """What the decorator was told. One that is not differentiable only measures."""
    return RewardInfo(
        name,
        foreign.summary,
        foreign.source,
        foreign.licence,
        foreign.range,
        differentiable=foreign.differentiable,
        trainable=foreign.differentiable,
        sees=foreign.sees,
    )


class Guarded:
    """A plug-in's reward that answers as the contract says, or says what it did instead.

    It has ``to`` and ``gradient_checkpointing`` where the plug-in's class has them.
    """

    def __init__(self, name: str, foreign: Foreign, made: Any) -> None:
        self.name, self.foreign, self.made, self.info = name, foreign, made, info_of(name, foreign)

    def __getattr__(self, extra: str) -> Any:
        if extra == "latents":
            return self._latents()
        if extra not in EXTRAS:
            raise AttributeError(extra)
        return self._blamed(getattr(self.made, extra), f"failed in {extra}()")

    def _latents(self) -> LatentSpace:
        found = getattr(self.made, "latents", None)
        if not isinstance(found, LatentSpace):
            text = "sees latents and does not say whose"
            remedy = "give the class `latents = LatentSpace(name, channels, scaling, factor)` (rewards.base)"
            raise PluginFault(f"the plug-in's reward {self.name} {text}", remedy=remedy)
        return found

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = self._blamed(self.made.score, "failed")(images, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = f"a tensor of {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise self._fault(f"returned {got}, not one score per image ({len(images)},)")
        if self.info.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise PluginFault(
                f"the reward {self.name} has no gradient: it detached the images, or scores them outside torch",
                remedy="measure it only (validation.rewards); trainers by policy gradient (DDPO, Flow-GRPO) learn from "
                f"such scores; to find where the graph ends: `{_check(self.name, self.foreign)}`",
            )
        # of a model that collapsed to NaN images, scores are NaN as well
        if not bool(torch.isfinite(scores).all()) and bool(torch.isfinite(images).all()):
            raise self._fault("returned a score that is no finite number, of images that are")
        return scores

    def _blamed(self, method: Callable[..., Any], failed: str) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            # memory is the command's boundary to explain
            except torch.OutOfMemoryError:
                raise
            # foreign code may raise anything
            except Exception as fault:
                raise self._fault(f"{failed}: {type(fault).__name__}: {fault}") from fault

        return call

    def _fault(self, text: str) -> PluginFault:
        return PluginFault(f"the plug-in's reward {self.name} {text}", remedy=_hint(self.name, self.foreign))


def guarded(name: str, foreign: Foreign, options: dict[str, Any]) -> Guarded:
    """Make the reward; raises PluginFault when its constructor fails."""
    try:
        return Guarded(name, foreign, foreign.make(**options))
    except Exception as fault:
        text = f"the plug-in's reward {name} cannot be made: {type(fault).__name__}: {fault}"
        raise PluginFault(text, remedy=_hint(name, foreign)) from fault
