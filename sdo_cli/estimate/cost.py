"""What a computation costs, found by running it on meta tensors: real operations and autograd, but no numbers."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sdo_cli.estimate.work import Operation, Work, operation_of

META = torch.device("meta")
_aten = torch.ops.aten


def _as_on_a_gpu(kernel: Any) -> Any:
    """torch's formula of a fused attention, marked as one that takes tensors."""
    formula = partial(flop_registry[kernel])
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


# attention's kernel of the CPU has the same products; not every version of torch counts it
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _as_on_a_gpu(_aten._scaled_dot_product_flash_attention),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _as_on_a_gpu(
        _aten._scaled_dot_product_flash_attention_backward
    ),
}
_FORMULAS = {**CPU_ATTENTION, **flop_registry}


@dataclass(frozen=True)
class Cost:
    """Attributes:
    work: every operation, with what seconds depend on.
    peak: most bytes in tensors alive at once, above those that were there before.
    left: bytes of new tensors still alive at the end.
    attention: FLOPs of attention's products among all.
    """

    work: Work
    peak: int
    left: int
    attention: float = 0.0

    @property
    def flops(self) -> float:
        """Of matrix products, convolutions and attention, by torch's own formulas (a multiply-add is two)."""
        return self.work.flops


class _Tally(TorchDispatchMode):
    """Sees every operation below autograd, its backward included, and the storages it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.attention, self.alive, self.peak = 0.0, 0.0, 0, 0
        self._known: set[int] = set()
        self.operations: Counter[Operation] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # a model asks for a value, as transformers does of its masks: true
            return torch.ones((), dtype=args[0].dtype).item()
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        flops = None if formula is None else float(formula(*args, **kwargs, out_val=result))
        if (operation := operation_of(func, args, kwargs, result, flops)) is not None:
            self.operations[operation] += 1
            self.flops += operation.flops
            self.attention += operation.flops if operation.product.startswith("attention") else 0.0
        given = {_key(tensor) for tensor in _meta_tensors((args, kwargs))}
        for tensor in _meta_tensors(result):
            # views and results in place bring no memory
            if _key(tensor) not in given:
                self._take(tensor)
        return result

    def _take(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _meta_tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On meta tensors torch takes attention apart, with the whole [L, L] matrix; devices have a kernel without it."""
    apart = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        # a mask is small beside the rest
        names = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | options
        if not query.is_meta or query.dim() != 4 or names.get("enable_gqa"):
            return apart(query, key, value, *args, **options)
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, bool(names.get("is_causal")), scale=names.get("scale"))[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = apart


def count(run: Callable[[], object]) -> Cost:
    """Run on meta tensors and count.

    Memory of CPU tensors and a kernel's own scratch are not counted.
    """
    return count_parts(lambda split: run())[0]


class Split:
    """FLOPs of parts of a computation that :func:`count_parts` counts."""

    def __init__(self, tally: _Tally) -> None:
        self._tally, self.parts = tally, dict[str, tuple[float, float]]()

    def measure(self, name: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returns; its FLOPs, and attention's among them, are kept under ``name``."""
        flops, attention = self._tally.flops, self._tally.attention
        result = run()
        self.parts[name] = (self._tally.flops - flops, self._tally.attention - attention)
        return result


def count_parts(run: Callable[[Split], object]) -> tuple[Cost, dict[str, tuple[float, float]]]:
    """Like :func:`count`, with the FLOPs ``(all, attention)`` of every part that ``run`` measures."""
    with _fused_attention(), _Tally() as tally:
        split = Split(tally)
        kept = run(split)
    cost = Cost(Work(dict(tally.operations)), tally.peak, tally.alive, tally.attention)
    del kept
    return cost, split.parts
