"""How fast a device is at what networks are made of: products of matrices, moving bytes, starting kernels."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import nn

from sdo_cli.device import dtype_of

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
# the C library maps blocks of 32 MiB and more anew each time: operations that read and write one
FRESH = 2 * 2**25


# (FLOPs, FLOP per second) of products that grow: small ones do not fill a device
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Speed:
    """Attributes:
    name: of the device, for people.
    rates: by (product, precision); products are ``matrix``, ``convolution``, ``attention`` and the latter two's
        ``… backward``, precisions ``no``, ``fp16``, ``bf16`` (a multiply-add is two FLOPs).
    bandwidth: bytes per second between memory and processor, reading and writing added up.
    launch: seconds until an operation is on its way, however small it is.
    measured: False when the figures are a maker's and not this machine's.
    fresh: bytes per second of operations so large that a CPU gets new memory for them; ``bandwidth`` where 0.
    ahead: the device computes while the next operation is prepared, as GPUs do.
    """

    name: str
    rates: Mapping[tuple[str, str], Curve]
    bandwidth: float
    launch: float
    measured: bool = False
    fresh: float = 0.0
    ahead: bool = True

    @property
    def products(self) -> dict[str, float]:
        """FLOP per second of large matrix products, by precision."""
        return {precision: curve[-1][1] for (name, precision), curve in self.rates.items() if name == "matrix"}

    def rate(self, product: str, precision: str, flops: float) -> float:
        """FLOP per second of one product with so many; a kind not known is as fast as the one it is made of."""
        for name in (product, product.removesuffix(" backward"), "matrix"):
            if (curve := self.rates.get((name, precision))) is not None:
                return _between(curve, flops)
        raise KeyError(precision)

    def bandwidth_of(self, moved: float) -> float:
        """Bytes per second of an operation that moves so many."""
        return self.fresh if self.fresh and moved >= FRESH else self.bandwidth


def _between(curve: Curve, flops: float) -> float:
    """Straight in both logarithms; beyond the ends the end's."""
    after = next((place for place, (size, _) in enumerate(curve) if size >= flops), len(curve) - 1)
    (small, slow), (large, fast) = curve[max(0, after - 1)], curve[after]
    if small == large or flops >= large:
        return fast
    share = log(flops / small) / log(large / small)
    return slow * (fast / slow) ** share


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
    from sdo_cli.estimate.cost import META, count

    def made(where: torch.device) -> Callable[[], None]:
        with where:
            x = torch.ones(1, 8, 4)
            net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 8), nn.SiLU()) for _ in range(8)])
        return lambda: (x + net(x)).sum().backward()

    return _best(made(device), device, inner=10) / count(made(META)).work.launches
