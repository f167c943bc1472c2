"""How fast a device is at what networks are made of: products of matrices, moving bytes, starting kernels."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sdo_cli.device import dtype_of

# the best of several is the device's; the others are the neighbours'
REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Attributes:
    name: of the device, for people.
    products: FLOP per second of large matrix products, by precision ``no``, ``fp16``, ``bf16`` (a multiply-add is two).
    bandwidth: bytes per second between memory and processor, reading and writing added up.
    launch: seconds an operation takes however small it is.
    measured: False when the figures are a maker's and not this machine's.
    """

    name: str
    products: Mapping[str, float]
    bandwidth: float
    launch: float
    measured: bool = False


def measure_speed(device: torch.device, precisions: tuple[str, ...] = ("no", "bf16")) -> Speed:
    """Measure in about a second on a GPU, a few on a CPU."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "this CPU"
    products = {precision: _products(device, dtype_of(precision), 8192 if on_gpu else 1536) for precision in precisions}
    return Speed(name, products, _bandwidth(device, 2**28 if on_gpu else 2**25), _launch(device), measured=True)


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


def _products(device: torch.device, dtype: torch.dtype, side: int) -> float:
    # random: constant operands draw less power, and a GPU then clocks higher than in earnest
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device, inner=4)


def _bandwidth(device: torch.device, elements: int) -> float:
    a, b, out = (torch.ones(elements, device=device) for _ in range(3))
    return 3 * a.nbytes / _best(lambda: torch.add(a, b, out=out), device)


def _launch(device: torch.device) -> float:
    a = torch.zeros(1, device=device)
    return _best(lambda: a.add_(1), device, inner=1000)
