"""GPUs by name: memory and speed as their maker states them."""

import re
from dataclasses import dataclass

from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.speed import Curve, Speed

# assumptions: what of a maker's peak networks reach, and how long torch's Python needs to send an operation on its way
# (measure_speed finds 17 to 25 µs on a CPU of an EPYC server)
PRODUCT_SHARE, BANDWIDTH_SHARE, LAUNCH = 0.7, 0.8, 2e-5


@dataclass(frozen=True)
class Gpu:
    """A maker's figures: dense (no sparsity), at boost clock, sums in fp32.

    Attributes:
        name: as people write it.
        memory: GB of 10⁹ bytes.
        fp32: TFLOP/s without tensor cores, which is how torch multiplies fp32 matrices by default.
        tf32: TFLOP/s of tensor cores on fp32 numbers, which torch's convolutions use by default; 0 for none.
        half: TFLOP/s of tensor cores in fp16, and in bf16 where ``bf16``.
        bandwidth: GB/s.
        source: the maker's paper.
    """

    name: str
    memory: float
    fp32: float
    tf32: float
    half: float
    bandwidth: float
    source: str
    bf16: bool = True

    @property
    def speed(self) -> Speed:
        """What is likely reached of it."""
        rates = {("matrix", "no"): _flat(self.fp32), ("matrix", "fp16"): _flat(self.half)}
        if self.bf16:
            rates["matrix", "bf16"] = _flat(self.half)
        rates["convolution", "no"] = _flat(self.tf32 or self.fp32)
        return Speed(self.name, rates, BANDWIDTH_SHARE * 1e9 * self.bandwidth, LAUNCH)


def _flat(tera: float) -> Curve:
    return ((1.0, PRODUCT_SHARE * 1e12 * tera),)


GPUS = (
    #    name                  GB    fp32   tf32   half    GB/s
    Gpu("T4", 16, 8.1, 0, 65, 320, "Turing whitepaper", bf16=False),
    Gpu("V100 16GB", 16, 15.7, 0, 125, 900, "V100 datasheet, SXM2", bf16=False),
    Gpu("V100 32GB", 32, 15.7, 0, 125, 900, "V100 datasheet, SXM2", bf16=False),
    Gpu(
        "RTX 3060 12GB", 12, 12.7, 12.7, 25.5, 360, "specifications; tensor cores as the GA102 whitepaper's of GeForce"
    ),
    Gpu("RTX 3080 10GB", 10, 29.8, 29.8, 59.5, 760, "GA102 whitepaper"),
    Gpu("RTX 3090", 24, 35.6, 35.6, 71, 936, "GA102 whitepaper"),
    Gpu("RTX 4070", 12, 29.1, 29.1, 58.3, 504, "specifications; tensor cores as the Ada whitepaper's of GeForce"),
    Gpu("RTX 4080", 16, 48.7, 48.7, 97.5, 717, "Ada whitepaper"),
    Gpu("RTX 4090", 24, 82.6, 82.6, 165.2, 1008, "Ada whitepaper"),
    Gpu("RTX 5090", 32, 104.8, 104.8, 209.5, 1792, "RTX Blackwell whitepaper"),
    Gpu("RTX A6000", 48, 38.7, 77.4, 154.8, 768, "GA102 whitepaper"),
    Gpu("RTX 6000 Ada", 48, 91.1, 182.1, 364.2, 960, "datasheet, half of the figures with sparsity"),
    Gpu("A10", 24, 31.2, 62.5, 125, 600, "datasheet"),
    Gpu("L4", 24, 30.3, 60, 121, 300, "datasheet, half of the figures with sparsity"),
    Gpu("L40S", 48, 91.6, 183, 362, 864, "datasheet"),
    Gpu("A100 40GB", 40, 19.5, 156, 312, 1555, "datasheet, SXM"),
    Gpu("A100 80GB", 80, 19.5, 156, 312, 2039, "datasheet, SXM"),
    Gpu("H100 PCIe", 80, 51, 378, 756, 2000, "datasheet, half of the figures with sparsity"),
    Gpu("H100 SXM", 80, 67, 494, 989, 3350, "datasheet, half of the figures with sparsity"),
    Gpu("H200", 141, 67, 494, 989, 4800, "datasheet, half of the figures with sparsity"),
    Gpu("B200", 180, 75, 1100, 2250, 7700, "datasheet, HGX, an eighth; half of the figures with sparsity"),
)
# what makers write before a name and people leave out
_PREFIXES = ("nvidia", "geforce", "tesla", "quadro")


def find_gpu(text: str) -> Gpu:
    """By name, however written: ``4090``, ``rtx-4090``, ``a100-80gb``; of several the one with least memory.

    Raises:
        RecipeFault: none of them.
    """
    wanted = _plain(text)
    ranked = sorted((gpu for gpu in GPUS if _means(wanted, _plain(gpu.name))), key=lambda gpu: gpu.memory)
    if not ranked:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise RecipeFault(
            [f"--gpu {text}: is not among the GPUs sdo knows: {known}; --gpu-memory fits any other"],
            what="command line",
        )
    return ranked[0]


def _means(wanted: str, name: str) -> bool:
    """Words in order; RTX may be left out at the start, and words at the end as long as a number is there."""
    names = (name, name.removeprefix("rtx "))
    return bool(re.search(r"\d", wanted)) and any(f"{known} ".startswith(f"{wanted} ") for known in names)


def _plain(text: str) -> str:
    """Lower case, words apart: ``NVIDIA RTX4090`` and ``rtx-4090`` are ``rtx 4090``."""
    words = re.findall(r"rtx|ada|[a-z]*\d+[a-z]*?(?=ada|\b|_)|[a-z]+", text.lower())
    return " ".join(word for word in words if word not in _PREFIXES)
