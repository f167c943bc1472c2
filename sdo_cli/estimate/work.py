"""What a computation asks of a device, and seconds on one of known speed: the roofline, operation by operation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from sdo_cli.estimate.speed import Speed

_aten = torch.ops.aten
PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
# they reserve memory and touch none of it
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
# of what they change they read nothing
_OVERWRITE = {_aten.copy_, _aten.zero_, _aten.fill_}
# of a table they read the rows they hand out
_PICK = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}


@dataclass(frozen=True)
class Operation:
    """What seconds depend on.

    Attributes:
        product: ``matrix``, ``convolution``, ``attention``, the latter two also ``… backward``; empty for what only
            moves numbers.
        precision: of a product's inputs: ``no``, ``fp16``, ``bf16``.
        flops: of products (a multiply-add is two).
        moved: bytes read and written, each tensor once.
    """

    product: str
    precision: str
    flops: float
    moved: float


@dataclass(frozen=True)
class Work:
    """How often each operation runs; means over plans make that a fraction."""

    operations: Mapping[Operation, float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        total = dict(self.operations)
        for operation, number in other.operations.items():
            total[operation] = total.get(operation, 0.0) + number
        return Work(total)

    def __mul__(self, factor: float) -> "Work":
        return Work({operation: factor * number for operation, number in self.operations.items()})

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    @property
    def flops(self) -> float:
        return sum(number * operation.flops for operation, number in self.operations.items())

    @property
    def moved(self) -> float:
        """Bytes."""
        return sum(number * operation.moved for operation, number in self.operations.items())

    @property
    def launches(self) -> float:
        return sum(self.operations.values())

    @property
    def precisions(self) -> set[str]:
        """Of its products."""
        return {operation.precision for operation in self.operations if operation.product}

    def seconds(self, speed: Speed) -> float:
        """Every operation waits for its products or for its bytes, whichever takes longer.

        A GPU computes while the processor prepares what comes next, so the slower of both counts; a CPU does one after
        the other.
        """
        computing = sum(number * _seconds(operation, speed) for operation, number in self.operations.items())
        preparing = self.launches * speed.launch
        return max(computing, preparing) if speed.ahead else computing + preparing

    def bound(self, speed: Speed) -> float:
        """Seconds that its products alone would take, all as fast as large ones of matrices."""
        return sum(
            number * operation.flops / speed.products[operation.precision]
            for operation, number in self.operations.items()
            if operation.flops
        )


NOTHING = Work()


def moving(moved: float, number: float = 1.0) -> Work:
    """``number`` operations that read and write ``moved`` bytes each."""
    return Work({Operation("", "", 0.0, moved): number})


def _seconds(operation: Operation, speed: Speed) -> float:
    moving = operation.moved / speed.bandwidth_of(operation.moved)
    if not operation.flops:
        return moving
    return max(moving, operation.flops / speed.rate(operation.product, operation.precision, operation.flops))


def operation_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any, flops: float | None) -> Operation | None:
    """What one call below autograd does; None for what touches no number.

    Args:
        flops: None for what is no product.
    """
    kernel = func._overloadpacket
    given, made = _tensors((args, kwargs)), _tensors(result)
    changed = _changed(func, args, kwargs)
    if kernel in _EMPTY or not (given or made) or (not changed and _is_view(given, made)):
        return None
    written = {**changed, **made}
    read = {key: size for key, size in given.items() if kernel not in _OVERWRITE or key not in changed}
    moved = 2 * sum(written.values()) if kernel in _PICK else sum(read.values()) + sum(written.values())
    if flops is None:
        return Operation("", "", 0.0, float(moved))
    return Operation(_product(kernel.__name__), _precision(args, kwargs), flops, float(moved))


def meta_tensors(tree: Any) -> list[Tensor]:
    """Every tensor of the device in what an operation takes or returns: sequences and mappings, nested."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_meta else []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    # pytree's own walk takes longer than most operations
    return [tensor for part in tree for tensor in meta_tensors(part)]


def _tensors(tree: Any) -> dict[Any, int]:
    """Bytes of every tensor of the device, by the numbers it shows."""
    return {_numbers(tensor): _size(tensor) for tensor in meta_tensors(tree)}


def _numbers(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _size(tensor: Tensor) -> int:
    """What is expanded is read once."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(length if step else 1 for length, step in steps)


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[Any, int]:
    """What is written in place."""
    if not func._schema.is_mutable:
        return {}
    places = enumerate(func._schema.arguments)
    marked = [(place, arg.name) for place, arg in places if arg.alias_info is not None and arg.alias_info.is_write]
    return _tensors([args[place] if place < len(args) else kwargs.get(name) for place, name in marked])


def _is_view(given: dict[Any, int], made: dict[Any, int]) -> bool:
    return {key[0] for key in made} <= {key[0] for key in given} if made else False


def _product(kernel: str) -> str:
    kind = next((product for product in ("convolution", "attention") if product in kernel), "matrix")
    return f"{kind} backward" if kind != "matrix" and kernel.endswith("backward") else kind


def _precision(args: Any, kwargs: dict[str, Any]) -> str:
    kinds = [tensor.dtype for tensor in meta_tensors((args, kwargs))]
    return next((PRECISIONS[kind] for kind in kinds if kind in PRECISIONS), "no")
