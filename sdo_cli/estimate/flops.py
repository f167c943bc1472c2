"""FLOPs of what really runs, by torch's own formulas."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
FORMULAS = {**CPU_ATTENTION, **flop_registry}


class _Counter(TorchDispatchMode):
    """As torch's ``FlopCounterMode``, which also hooks into every module, to count by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        # what is not made of other operations; asking again and again takes longer than most of them
        self._whole: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and func not in self._whole:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            self._whole.add(func)
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def count_flops(run: Callable[[], object]) -> float:
    """FLOPs of matrix products, convolutions and attention in ``run``, backward passes included.

    A multiply-add is two. The sum is that of ``torch.utils.flop_counter.FlopCounterMode``, found in less time.
    """
    with _Counter() as counter:
        run()
    return counter.flops
