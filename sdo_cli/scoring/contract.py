"""What every reward must keep, tried out one thing at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdo_cli.errors import SdoError

PROMPTS = ["a tiger on a teal background", "a red bus", "a rose on a white table", "two cats"]


@dataclass(frozen=True)
class Finding:
    """One item of the contract. ``passed`` is None for what is only told."""

    item: str
    passed: bool | None
    figure: str


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images ``[count, 3, size, size]`` in [0, 1]."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0.02, 0.98)


def check_contract(reward: Any, *, size: int = 64, device: torch.device | None = None) -> Iterator[Finding]:
    """Try a reward on random images; a check that raises has failed, with what was said.

    Args:
        size: height and width of the images in pixels.
    """
    device = device or torch.device("cpu")
    if hasattr(reward, "to"):
        reward.to(device)
    images = pictures(4, size).to(device)
    for item, check in CHECKS.items():
        if item in ("gradient", "finite differences", "half precision") and not reward.info.differentiable:
            yield Finding(item, None, "it only measures")
            continue
        try:
            passed, figure = check(reward, images)
        # foreign code may raise anything
        except Exception as fault:
            passed, figure = False, fault.message if isinstance(fault, SdoError) else f"{type(fault).__name__}: {fault}"
        yield Finding(item, passed, figure)


Check = Callable[[Any, Tensor], tuple[bool | None, str]]


@torch.no_grad()
def _shape(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    scores = reward.score(images, PROMPTS)
    return scores.shape == (4,) and scores.is_floating_point(), f"{tuple(scores.shape)} {scores.dtype}"


@torch.no_grad()
def _finite(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    """Also on black and white images: a square root at zero, a division by no spread."""
    flat = torch.stack([images[0], torch.zeros_like(images[0]), torch.ones_like(images[0]), images[1]])
    scores = reward.score(flat, PROMPTS)
    return bool(torch.isfinite(scores).all()), "scores " + " ".join(f"{score:.4g}" for score in scores.tolist())


@torch.no_grad()
def _range(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    scores, (low, high) = reward.score(images, PROMPTS), reward.info.range
    inside = bool(((scores >= low) & (scores <= high)).all())
    text = f"{scores.min():.4g} … {scores.max():.4g}, said to be in {low:g} … {high:g}"
    # random pictures may well score outside of what is usual
    return True if inside else None, text


@torch.no_grad()
def _untouched(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    before = images.clone()
    reward.score(images, PROMPTS)
    return torch.equal(before, images), "input left as it was" if torch.equal(before, images) else "changed in place"


@torch.no_grad()
def _repeatable(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    difference = (reward.score(images, PROMPTS) - reward.score(images, PROMPTS)).abs().max().item()
    return difference == 0, f"two calls differ by {difference:.2g}"


@torch.no_grad()
def _alone(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    """The three-stage engine scores samples in any batches, so each must stand on its own."""
    together = reward.score(images, PROMPTS)
    apart = torch.cat([reward.score(images[j : j + 1], PROMPTS[j : j + 1]) for j in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    mixed = reward.score(images[order], [PROMPTS[j] for j in order.tolist()])
    worst = max((together - apart).abs().max().item(), (together[order] - mixed).abs().max().item())
    return worst <= 1e-4 * max(1.0, together.abs().max().item()), f"alone and in a batch differ by {worst:.2g}"


def _gradient(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    leaf = images.clone().requires_grad_()
    reward.score(leaf, PROMPTS).sum().backward()
    if leaf.grad is None or not bool(torch.isfinite(leaf.grad).all()):
        return False, "no gradient reaches the images" if leaf.grad is None else "the gradient is not finite"
    norms = leaf.grad.flatten(1).norm(dim=1)
    return bool((norms > 0).all()), f"norm per image {norms.min():.3g} … {norms.max():.3g}"


def _differences(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    """Directional derivative by central differences; in float64 where the reward can be cast."""
    dtype, step, tolerance = torch.float32, 1e-2, 0.05
    if hasattr(reward, "to"):
        try:
            reward.to(images.device, torch.float64)
            dtype, step, tolerance = torch.float64, 1e-6, 1e-3
        except (RuntimeError, TypeError, SdoError):
            reward.to(images.device, torch.float32)
    else:
        dtype, step, tolerance = torch.float64, 1e-6, 1e-3
    try:
        leaf = images[:2].to(dtype).requires_grad_()
        score = reward.score(leaf, PROMPTS[:2])
        score.sum().backward()
        assert leaf.grad is not None
        along = leaf.grad / leaf.grad.norm()
        with torch.no_grad():
            ends = [reward.score(leaf + sign * step * along, PROMPTS[:2]).double().sum() for sign in (1, -1)]
    finally:
        if hasattr(reward, "to"):
            reward.to(images.device, torch.float32)
    slope, claimed = ((ends[0] - ends[1]) / (2 * step)).item(), leaf.grad.norm().item()
    ratio = slope / claimed if claimed else float("nan")
    # a resize that rounds to bytes has steps that differences do not see past
    return abs(ratio - 1) < tolerance, f"slope along the gradient is {ratio:.5f} of its norm ({str(dtype)[6:]})"


def _prompts(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    with torch.no_grad():
        moved = (reward.score(images, PROMPTS) - reward.score(images, PROMPTS[::-1])).abs().max().item()
    return None, f"other prompts change the score by up to {moved:.3g}"


def _half(reward: Any, images: Tensor) -> tuple[bool | None, str]:
    if not hasattr(reward, "to"):
        return None, "it has no to(device, dtype)"
    with torch.no_grad():
        exact = reward.score(images, PROMPTS)
        reward.to(images.device, torch.bfloat16)
        try:
            half = reward.score(images, PROMPTS).float()
        finally:
            reward.to(images.device, torch.float32)
    error = ((half - exact).abs().max() / exact.abs().max().clamp(min=1e-9)).item()
    return bool(torch.isfinite(half).all()) and error < 0.2, f"bf16 differs by {error:.2%} of the largest score"


CHECKS: dict[str, Check] = {
    "shape": _shape,
    "finite": _finite,
    "range": _range,
    "input untouched": _untouched,
    "repeatable": _repeatable,
    "each image alone": _alone,
    "gradient": _gradient,
    "finite differences": _differences,
    "prompts": _prompts,
    "half precision": _half,
}
