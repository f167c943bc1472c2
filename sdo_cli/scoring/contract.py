"""What every reward must keep, tried out one thing at a time."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import LatentSpace
from sdo_cli.errors import SdoError

PROMPTS = ["a tiger on a teal background", "a red bus", "a rose on a white table", "two cats"]
# of the largest score: sums are taken in another order in another batch; convolutions of a GPU may run in TF32
SAME = {"cpu": 1e-4, "cuda": 5e-3}
# of the largest score, in half precision
NEAR = 0.2


@dataclass(frozen=True)
class Finding:
    """One item of the contract.

    Attributes:
        passed: None for what is only told.
        figure: what was measured.
        remedy: what to change, for one that failed.
    """

    item: str
    passed: bool | None
    figure: str
    remedy: str = ""


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images ``[count, 3, size, size]`` in [0, 1]."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0.02, 0.98)


def latents(reward: Any, size: int) -> Tensor:
    """Random latents ``[4, C, h, w]`` of pictures of this size; of variance one, as a model's are."""
    space: LatentSpace = reward.latents
    side = max(1, size // space.factor)
    return torch.randn(len(PROMPTS), space.channels, side, side, generator=torch.Generator().manual_seed(0))


def check_contract(reward: Any, *, size: int = 64, device: torch.device | None = None) -> Iterator[Finding]:
    """Try a reward on random images; a check that raises has failed, with what was said.

    Nothing else can be judged where the shape is wrong, so that is then the only finding. Weights are cast to half
    precision in the end and stay rounded: make the reward anew for any other use.

    Args:
        size: height and width of the images in pixels; latents are of such images.
        device: where to try it, the CPU if not given.
    """
    device = device or torch.device("cpu")
    _cast(reward, device, torch.float32)
    images = (latents(reward, size) if reward.info.sees == "latent" else pictures(len(PROMPTS), size)).to(device)
    for item, (check, remedy) in CHECKS.items():
        if item in OF_GRADIENTS and not reward.info.differentiable:
            yield Finding(item, None, "it only measures")
            continue
        passed, figure = _tried(check, reward, images.clone())
        yield Finding(item, passed, figure, remedy if passed is False else "")
        if item == "shape" and not passed:
            return


# whether it holds (None: only told), and the figure
Outcome = tuple[bool | None, str]
Check = Callable[[Any, Tensor], Outcome]


def _tried(check: Check, reward: Any, images: Tensor) -> Outcome:
    try:
        return check(reward, images)
    # foreign code may raise anything
    except Exception as fault:
        return False, fault.message if isinstance(fault, SdoError) else f"{type(fault).__name__}: {fault}"


def _cast(reward: Any, device: torch.device, dtype: torch.dtype) -> None:
    if hasattr(reward, "to"):
        reward.to(device, dtype)


def _largest(scores: Tensor) -> float:
    return max(scores.abs().max().item(), 1e-3)


@torch.no_grad()
def _shape(reward: Any, images: Tensor) -> Outcome:
    scores = reward.score(images, PROMPTS)
    if not isinstance(scores, Tensor):
        return False, f"a {type(scores).__name__}"
    return scores.shape == (len(images),) and scores.is_floating_point(), f"{tuple(scores.shape)} {scores.dtype}"


@torch.no_grad()
def _device(reward: Any, images: Tensor) -> Outcome:
    """Scores are where the images are, and on a GPU those of the CPU."""
    scores = reward.score(images, PROMPTS)
    if scores.device != images.device or images.device.type == "cpu":
        return scores.device == images.device, f"images on {images.device}, scores on {scores.device}"
    try:
        _cast(reward, torch.device("cpu"), torch.float32)
        there = reward.score(images.cpu(), PROMPTS)
    finally:
        _cast(reward, images.device, torch.float32)
    error = (scores.cpu() - there).abs().max().item() / _largest(there)
    return error <= SAME["cuda"], f"{images.device} and cpu differ by {error:.2g} of the largest score"


@torch.no_grad()
def _finite(reward: Any, images: Tensor) -> Outcome:
    """Also on black and white images: a square root at zero, a division by no spread."""
    flat = torch.stack([images[0], torch.zeros_like(images[0]), torch.ones_like(images[0]), images[1]])
    scores = reward.score(flat, PROMPTS)
    return bool(torch.isfinite(scores).all()), "scores " + " ".join(f"{score:.4g}" for score in scores.tolist())


@torch.no_grad()
def _range(reward: Any, images: Tensor) -> Outcome:
    """Random pictures may well score outside of what is usual, so this is only told."""
    scores, (low, high) = reward.score(images, PROMPTS), reward.info.range
    inside = bool(((scores >= low) & (scores <= high)).all())
    text = f"{scores.min():.4g} … {scores.max():.4g}, {'as' if inside else 'NOT as'} said: {low:g} … {high:g}"
    return True if inside else None, text


@torch.no_grad()
def _apart(reward: Any, images: Tensor) -> Outcome:
    """One that takes pixels for bytes finds them all black."""
    shown = torch.stack([images[0], torch.zeros_like(images[0]), torch.ones_like(images[0]), images[1]])
    scores = reward.score(shown, PROMPTS[:1] * len(shown))
    finite = scores[torch.isfinite(scores)].tolist() or [0.0]
    spread = max(finite) - min(finite)
    return spread > 0, f"two pictures, black and white score {spread:.3g} apart"


@torch.no_grad()
def _untouched(reward: Any, images: Tensor) -> Outcome:
    before = images.clone()
    reward.score(before, PROMPTS)
    same = torch.equal(before, images)
    return same, "left as it was" if same else "changed in place"


@torch.no_grad()
def _repeatable(reward: Any, images: Tensor) -> Outcome:
    difference = (reward.score(images, PROMPTS) - reward.score(images, PROMPTS)).abs().max().item()
    return difference == 0, f"two calls differ by {difference:.2g}"


@torch.no_grad()
def _alone(reward: Any, images: Tensor) -> Outcome:
    """The three-stage engine scores samples in any batches, so each must stand on its own."""
    together = reward.score(images, PROMPTS)
    apart = torch.cat([reward.score(images[j : j + 1], PROMPTS[j : j + 1]) for j in range(len(images))])
    order = torch.tensor([2, 0, 3, 1], device=images.device)
    mixed = reward.score(images[order], [PROMPTS[j] for j in order.tolist()])
    worst = max((together - apart).abs().max().item(), (together[order] - mixed).abs().max().item())
    return worst <= SAME[images.device.type] * _largest(together), f"alone and in a batch differ by {worst:.2g}"


@torch.no_grad()
def _history(reward: Any, images: Tensor) -> Outcome:
    """A run that was resumed has scored less before: what is kept between calls must not show, to the last bit.

    By two copies and new prompts, of which nothing is kept yet. (Not by the reward itself: weights read from a file
    may be aligned in memory otherwise than a copy's, and products of matrices round by that.)
    """
    prompts, scores = [f"{prompt} at dusk" for prompt in PROMPTS], []
    for parts in ([], [2, 0]):
        try:
            copy = deepcopy(reward)
        # foreign objects may refuse in any way
        except Exception:
            return None, "it cannot be copied, so this was not tried"
        for first in parts:
            # clones: that images are left alone is another item
            copy.score(images[first : first + 2].clone(), prompts[first : first + 2])
        scores.append(copy.score(images.clone(), prompts))
    moved = (scores[0] - scores[1]).abs().max().item()
    return moved == 0, f"scores of a batch move by {moved:.2g} after parts of it were scored"


def _slope(reward: Any, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    scores = reward.score(leaf, PROMPTS[: len(leaf)])
    if scores.requires_grad:
        scores.sum().backward()
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _gradient(reward: Any, images: Tensor) -> Outcome:
    gradient = _slope(reward, images)
    if not bool(torch.isfinite(gradient).all()):
        return False, "it is not finite"
    norms = gradient.flatten(1).norm(dim=1)
    return bool((norms > 0).all()), f"norm per image {norms.min():.3g} … {norms.max():.3g}"


def _differences(reward: Any, images: Tensor) -> Outcome:
    """In float64; one whose weights stay in float32 is tried in that, with a wider step and tolerance.

    Encoders that resize as PIL does round to bytes and pass the gradient straight through. Fine steps do not see past
    that, so a reward that fails them is tried with steps of half a byte, between bytes.
    """
    pair = images[:2]
    try:
        _cast(reward, images.device, torch.float64)
        fine = _central(reward, pair.double(), step=1e-6, tolerance=1e-3)
    # foreign code may raise anything
    except Exception:
        _cast(reward, images.device, torch.float32)
        fine = _central(reward, pair, step=1e-2, tolerance=0.05)
    finally:
        _cast(reward, images.device, torch.float32)
    if fine[0]:
        return fine
    return _central(reward, pair, step=0.5 / 255 * pair.numel() ** 0.5, tolerance=0.1, shifts=4)


def _central(reward: Any, images: Tensor, *, step: float, tolerance: float, shifts: int = 0) -> Outcome:
    """The derivative along the gradient by central differences, which is the gradient's norm.

    Args:
        step: its length over all pixels.
        shifts: how many random shifts of up to half a byte per pixel to take the mean over; 0 stays at the images.
    """
    gradient = _slope(reward, images)
    if (norm := gradient.norm().item()) == 0:
        return False, "there is no gradient"
    chance, rises = torch.Generator().manual_seed(0), []
    for _ in range(max(shifts, 1)):
        shift = (torch.rand(images.shape, generator=chance) - 0.5) / 255 if shifts else torch.zeros(images.shape)
        start = images + shift.to(images)
        with torch.no_grad():
            moved = [start + sign * step * gradient / norm for sign in (1, -1)]
            ends = [reward.score(side, PROMPTS[: len(images)]).double().sum().item() for side in moved]
        rises.append((ends[0] - ends[1]) / (2 * step))
    ratio = sum(rises) / len(rises) / norm
    how = f"{str(images.dtype)[6:]}, {'across bytes, ' if shifts else ''}allowed {1 - tolerance:g} … {1 + tolerance:g}"
    return abs(ratio - 1) < tolerance, f"slope along the gradient is {ratio:.4f} of its norm ({how})"


@torch.no_grad()
def _prompts(reward: Any, images: Tensor) -> Outcome:
    moved = (reward.score(images, PROMPTS) - reward.score(images, PROMPTS[::-1])).abs().max().item()
    return None, f"other prompts change the score by up to {moved:.3g}"


def _memory(reward: Any, images: Tensor) -> Outcome:
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        _slope(reward, images[:1])
        peak = torch.cuda.max_memory_allocated(images.device) - before
        return None, f"{peak / 1e6:.2f} MB at the peak of one image's score and gradient"
    # what two images keep more than one: no weights among it
    kept = _kept(reward, images[:2]) - _kept(reward, images[:1])
    return None, f"{kept / 1e6:.2f} MB kept for the backward pass, per image"


def _kept(reward: Any, images: Tensor) -> int:
    """Bytes autograd holds on to."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        reward.score(images.clone().requires_grad_(), PROMPTS[: len(images)])
    return sum(held.values())


def _half(dtype: torch.dtype) -> Check:
    @torch.no_grad()
    def check(reward: Any, images: Tensor) -> Outcome:
        if not hasattr(reward, "to"):
            return None, "it has no to(device, dtype): recipes' reward_precision leaves it as it is"
        exact = reward.score(images, PROMPTS)
        try:
            reward.to(images.device, dtype)
            half = reward.score(images, PROMPTS).to(exact.dtype)
        finally:
            reward.to(images.device, torch.float32)
        error = (half - exact).abs().max().item() / _largest(exact)
        return error < NEAR, f"differs from fp32 by {error:.2g} of the largest score (allowed {NEAR:g})"

    return check


OF_GRADIENTS = ("gradient", "finite differences", "memory")
PRECISION_REMEDY = "compute sums and square roots in float32; or keep reward_precision: no"
# each with what to change where it fails
CHECKS: dict[str, tuple[Check, str]] = {
    "shape": (_shape, "return one finite number per image, a floating-point tensor [B]"),
    "device": (_device, "move weights in to(device, dtype); make new tensors on images.device"),
    "finite": (_finite, "add a small number under square roots and logarithms and to divisors"),
    "range": (_range, "return a tensor [B] for any images in [0, 1]"),
    "tells images apart": (_apart, "images are in [0, 1], no bytes: do not round them or divide by 255"),
    "input untouched": (_untouched, "make new tensors: images.mul(…), not images.mul_(…)"),
    "repeatable": (_repeatable, "use no chance: call eval() on networks, leave out dropout and random crops"),
    "each image alone": (_alone, "use no statistics of the batch: call eval() on networks, take means per image"),
    "whatever came before": (
        _history,
        "what is kept of a prompt or an image must not hang on the batch that first asked: make it one by one",
    ),
    "gradient": (_gradient, "keep to torch between images and scores: no detach(), no_grad(), rounding, NumPy or PIL"),
    "finite differences": (_differences, "the gradient is not the score's: look for detach() and rounding on the way"),
    "prompts": (_prompts, "take a list of any prompts, one per image"),
    "memory": (_memory, ""),
    "bf16": (_half(torch.bfloat16), PRECISION_REMEDY),
    "fp16": (_half(torch.float16), PRECISION_REMEDY),
}
