"""Several updates per rollout: which rollout training is at, and what is kept of it (docs/gradients.md)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdo_cli.gradients.live import Kept, LiveCall
from sdo_cli.gradients.plan import Plan
from sdo_cli.parallel.world import SINGLE, World

ZEROS = "zeros"


@dataclass
class Replays:
    """Where training is between one rollout and the next.

    Attributes:
        rollout: number of the one that the next step goes on with, or begins; its noise, prompts and plan are drawn by
            this number. With one update per rollout it is the number of the step.
        update: the next step's on it; 0 begins it.
        looks: until which look at drift all have been taken.
        due: this rollout is one to be looked at.
        slices: what is kept of it, by the number of the slice of the global batch.
    """

    rollout: int = 0
    update: int = 0
    looks: int = 0
    due: bool = False
    slices: dict[int, Kept] = field(default_factory=dict)

    @classmethod
    def after(cls, steps: int, every: int) -> "Replays":
        """After ``steps`` steps of one update per rollout, drift being looked at ``every`` so many (0: never)."""
        return cls(steps, looks=-(-steps // every) if every else 0)

    def begin(self, step: int, every: int) -> None:
        """A rollout begins at this step; it is looked at when a multiple of ``every`` has come since the last look."""
        self.due = bool(every) and step >= self.looks * every
        if self.due:
            self.looks = step // every + 1

    def end_update(self, *, over: bool) -> None:
        """Go on to the next update, or to the next rollout."""
        self.update += 1
        if over:
            self.rollout, self.update, self.due, self.slices = self.rollout + 1, 0, False, {}

    def state(self, world: World = SINGLE) -> dict[str, Any]:
        """For a checkpoint, with every process's slices; all of them call it."""
        mine = {number: _packed(kept) for number, kept in self.slices.items()}
        slices: dict[int, Any] = {}
        for part in world.gather(mine):
            slices |= part
        return {
            "rollout": self.rollout,
            "update": self.update,
            "looks": self.looks,
            "due": self.due,
            "slices": slices,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave; its slices are :meth:`take_slices`'s."""
        self.rollout, self.update, self.looks = state["rollout"], state["update"], state["looks"]
        self.due = state["due"]

    def take_slices(self, state: dict[str, Any], plans: dict[int, Plan], device: torch.device) -> None:
        """Those of this process, with the plan of each by its number."""
        self.slices = {number: _unpacked(state["slices"][number], plan, device) for number, plan in plans.items()}


def _packed(kept: Kept) -> dict[str, Any]:
    return {
        "x_N": kept.x_N.cpu(),
        "g": kept.g.cpu(),
        "losses": kept.losses.cpu(),
        "rewards": {name: scores.cpu() for name, scores in kept.rewards.items()},
        **({} if kept.uncertainty is None else {"uncertainty": kept.uncertainty.cpu()}),
        "live": [{**_fields(live), "kept": _shapes_apart(live.kept)} for live in kept.live],
    }


def _unpacked(tree: dict[str, Any], plan: Plan, device: torch.device) -> Kept:
    rewards = {name: scores.to(device) for name, scores in tree["rewards"].items()}
    live = [LiveCall(**_on(device, {**call, "kept": _shapes_back(call["kept"])})) for call in tree["live"]]
    x_N, g, losses = (tree[name].to(device) for name in ("x_N", "g", "losses"))
    uncertainty = tree["uncertainty"].to(device) if "uncertainty" in tree else None
    return Kept(plan, x_N, g, losses, rewards, live, uncertainty)


def _fields(live: LiveCall) -> dict[str, Any]:
    found = {name: getattr(live, name) for name in LiveCall.__dataclass_fields__ if name != "kept"}
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found.items()}


def _on(device: torch.device, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _on(device, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_on(device, value) for value in tree)
    return tree


def _shapes_apart(tree: Any) -> Any:
    """Outputs of which only the shape is kept take no room in a file either."""
    if isinstance(tree, Tensor):
        only_shape = tree.numel() > 1 and not any(tree.stride())
        return (ZEROS, list(tree.shape), str(tree.dtype).removeprefix("torch.")) if only_shape else tree.cpu()
    if isinstance(tree, dict):
        return {key: _shapes_apart(value) for key, value in tree.items()}
    return type(tree)(map(_shapes_apart, tree)) if isinstance(tree, list | tuple) else tree


def _shapes_back(tree: Any) -> Any:
    if isinstance(tree, tuple) and tree and tree[0] == ZEROS:
        return torch.zeros((), dtype=getattr(torch, tree[2])).expand(tree[1])
    if isinstance(tree, dict):
        return {key: _shapes_back(value) for key, value in tree.items()}
    return type(tree)(map(_shapes_back, tree)) if isinstance(tree, list | tuple) else tree
