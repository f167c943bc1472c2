"""The speed of the device that is here, measured in seconds."""

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from sdo_cli.device import dtype_of
from sdo_cli.estimate.cost import META, count
from sdo_cli.estimate.speed import Curve, Speed

# the best of several is the device's; the others are the neighbours'
REPEATS = 5
# a run shorter than this says little, a longer one no more
ENOUGH = {"cpu": 0.01, "cuda": 0.002}
# of what is measured, growing until it takes long enough
SIDES, WIDTHS, LENGTHS = (
    (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    (8, 32, 64, 128, 320, 640, 1280),
    (32, 128, 512, 1024, 4096),
)


def measure_speed(device: torch.device, precisions: Iterable[str] = ("no", "bf16")) -> Speed:
    """Measure in about a second on a GPU, two or three on a CPU."""
    on_gpu = device.type == "cuda"
    return Speed(
        torch.cuda.get_device_name(device) if on_gpu else "this CPU",
        {
            (product, precision): measure(device, dtype_of(precision))
            for precision in precisions
            for product, measure in _PRODUCTS.items()
        },
        _bandwidth(device, 2**27 if on_gpu else 2**21),
        _launch(device),
        measured=True,
        # allocators of GPUs keep what they have
        fresh=0.0 if on_gpu else _bandwidth(device, 2**23),
        ahead=on_gpu,
    )


def _best(run: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Seconds of one ``run``, the best of some, each the mean of ``inner`` in a row."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(inner):
            run()
        _wait(device)
        return (time.perf_counter() - start) / inner

    once()
    return min(once() for _ in range(REPEATS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _grown(
    device: torch.device, sizes: Iterable[int], made: Callable[[int], tuple[float, Callable[[], object]]]
) -> Curve:
    """Up to the first that takes long enough.

    Half precision is emulated on many CPUs, a hundred times slower: large products would take minutes.
    """
    found: list[tuple[float, float]] = []
    for size in sizes:
        flops, run = made(size)
        seconds = _best(run, device)
        found.append((flops, flops / seconds))
        if seconds > ENOUGH[device.type]:
            break
    return tuple(found)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    # constant operands draw less power, and a GPU then clocks higher than in earnest
    return torch.randn(shape, device=device).to(dtype)


def _products(device: torch.device, dtype: torch.dtype) -> Curve:
    """As layers multiply: by the transposed weight forward, by the weight backward."""

    def made(side: int) -> tuple[float, Callable[[], object]]:
        a, b = (_random(device, dtype, side, side) for _ in range(2))
        # two products; the curve is of one
        return 4 * side**3, lambda: (a @ b.t(), a @ b)

    return tuple((flops / 2, rate) for flops, rate in _grown(device, SIDES, made))


def _convolutions(device: torch.device, dtype: torch.dtype) -> Curve:
    """3 × 3, as wide as the networks' at last."""

    def made(width: int) -> tuple[float, Callable[[], object]]:
        x, weight = _random(device, dtype, 2, width, 32, 32), _random(device, dtype, width, width, 3, 3)
        return 2 * 9 * width * x.numel(), lambda: F.conv2d(x, weight, padding=1)

    return _grown(device, WIDTHS, made)


def _convolutions_backward(device: torch.device, dtype: torch.dtype) -> Curve:
    """Towards the input, as with a frozen weight."""

    def made(width: int) -> tuple[float, Callable[[], object]]:
        x = _random(device, dtype, 2, width, 32, 32).requires_grad_()
        y = F.conv2d(x, _random(device, dtype, width, width, 3, 3), padding=1)
        g = torch.ones_like(y)
        return 2 * 9 * width * x.numel(), lambda: torch.autograd.grad(y, x, g, retain_graph=True)

    return _grown(device, WIDTHS, made)


def _attention(device: torch.device, dtype: torch.dtype) -> Curve:
    """Heads of 64, as most have."""

    def made(length: int) -> tuple[float, Callable[[], object]]:
        q, k, v = (_random(device, dtype, 2, 8, length, 64) for _ in range(3))
        return 4 * 64 * 2 * 8 * length**2, lambda: F.scaled_dot_product_attention(q, k, v)

    return _grown(device, LENGTHS, made)


def _attention_backward(device: torch.device, dtype: torch.dtype) -> Curve:
    """Five products; torch computes one of the forward pass's two again."""

    def made(length: int) -> tuple[float, Callable[[], object]]:
        q = _random(device, dtype, 2, 8, length, 64).requires_grad_()
        y = F.scaled_dot_product_attention(q, q, q)
        g = torch.ones_like(y)
        return 10 * 64 * 2 * 8 * length**2, lambda: torch.autograd.grad(y, q, g, retain_graph=True)

    return _grown(device, LENGTHS, made)


_PRODUCTS = {
    "matrix": _products,
    "convolution": _convolutions,
    "convolution backward": _convolutions_backward,
    "attention": _attention,
    "attention backward": _attention_backward,
}


@torch.no_grad()
def _bandwidth(device: torch.device, elements: int) -> float:
    """Of what networks do between products, into memory that is asked for anew each time."""
    # a group of a norm is one unit of a GPU's work: as many as networks have
    batch, channels = (16, 320) if device.type == "cuda" else (1, 32)
    a, b = (torch.ones(batch, channels, elements // (batch * channels), device=device) for _ in range(2))
    runs = ((3, lambda: a + b), (2, lambda: F.silu(a)), (2, lambda: F.group_norm(a, 32)))
    seconds = sum(_best(run, device) for _, run in runs)
    return sum(passes for passes, _ in runs) * a.nbytes / seconds


def _launch(device: torch.device) -> float:
    """Of small layers and their gradients: Python's modules, autograd and the operations themselves."""

    def made(where: torch.device) -> Callable[[], None]:
        with where:
            x = torch.ones(1, 8, 4)
            net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 8), nn.SiLU()) for _ in range(8)])
        return lambda: (x + net(x)).sum().backward()

    return _best(made(device), device, inner=10) / count(made(META)).work.launches
