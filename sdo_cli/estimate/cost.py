"""What a computation costs, found by running it on meta tensors: real operations and autograd, but no numbers."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdo_cli.estimate.flops import FORMULAS
from sdo_cli.estimate.work import Operation, Work, meta_tensors, operation_of

META = torch.device("meta")
_aten = torch.ops.aten


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


# networks repeat their layers, and recipes that differ little their networks
MOST_KNOWN = 100_000


@dataclass(frozen=True)
class _Known:
    """What an operation made of tensors like these: torch's own functions without data take ten times as long.

    Attributes:
        made: size, strides and type of every new tensor.
        alone: one tensor and no tuple of them.
    """

    operation: Operation | None
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    alone: bool

    @classmethod
    def of(cls, result: Any, made: list[Tensor], operation: Operation | None) -> "_Known | None":
        """None where another call could give something else: views, numbers, parts of a larger storage."""
        results = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple) else []
        if len(results) != len(made) or not results:
            return None
        for tensor in made:
            plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            if type(tensor) is not Tensor or plain.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
                return None
        if len({_key(tensor) for tensor in made}) < len(made):
            return None
        shapes = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in made)
        return cls(operation, shapes, isinstance(result, Tensor))

    def again(self) -> tuple[Any, list[Tensor]]:
        """The result, and its new tensors."""
        made = [torch.empty_strided(size, stride, dtype=kind, device=META) for size, stride, kind in self.made]
        return (made[0] if self.alone else tuple(made)), made


_KNOWN: dict[Any, _Known] = {}


@cache
def _makes_only_new(func: Any) -> bool:
    """No view, nothing changed in place, nothing but tensors returned."""
    schema = func._schema
    tensors = all(str(returned.type) == "Tensor" and returned.alias_info is None for returned in schema.returns)
    return bool(schema.returns) and tensors and not schema.is_mutable


def _signature(tree: Any) -> Any:
    """Everything a result's shape and the cost depend on; a tensor given twice is read once."""
    numbers: dict[Any, int] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor):
            layout = (part.storage_offset(), part.shape, part.stride())
            number = numbers.setdefault((part.untyped_storage()._cdata, layout), len(numbers))
            return number, layout, part.dtype, part.device
        if isinstance(part, list | tuple):
            return type(part), tuple(map(walk, part))
        if isinstance(part, dict):
            return tuple((name, walk(value)) for name, value in part.items())
        return type(part), part

    return walk(tree)


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
        known, key = None, None
        if _makes_only_new(func):
            key = (func, _signature((args, kwargs)))
            known = _KNOWN.get(key)
        if known is None:
            result = func(*args, **kwargs)
            formula = FORMULAS.get(func._overloadpacket)
            flops = None if formula is None else float(formula(*args, **kwargs, out_val=result))
            operation = operation_of(func, args, kwargs, result, flops)
            given = {_key(tensor) for tensor in meta_tensors((args, kwargs))}
            # views and results in place bring no memory
            made = [tensor for tensor in meta_tensors(result) if _key(tensor) not in given]
            if key is not None and (again := _Known.of(result, made, operation)) is not None:
                if len(_KNOWN) >= MOST_KNOWN:
                    _KNOWN.clear()
                _KNOWN[key] = again
        else:
            operation, (result, made) = known.operation, known.again()
        if operation is not None:
            self.operations[operation] += 1
            self.flops += operation.flops
            self.attention += operation.flops if operation.product.startswith("attention") else 0.0
        for tensor in made:
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
