"""How fast a device is at what networks are made of: products of matrices, moving bytes, starting kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

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
