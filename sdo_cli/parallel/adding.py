"""Gradients added up over the processes, while the last backward pass is still running.

Buckets go in the order in which a backward pass comes to them, the same everywhere; each as soon as all its gradients
are final and the one before it is on its way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# a bucket is a sixteenth of everything, so that little is left when the backward pass ends, within these elements
SMALLEST, LARGEST = 2**18, 2**23


@dataclass
class _Sent:
    """A bucket on its way: its flat tensor (gradients, then a flag each) and who to ask for its arrival."""

    parameters: list[nn.Parameter]
    flat: Tensor
    work: Any


class Adding:
    """One optimizer step's sum over the processes; every process makes one, and calls ``finish``.

    Args:
        parameters: in the order in which calls come to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets = list(_buckets(parameters))
        self._missing = [set(map(id, few)) for few in self._buckets]
        self._of = {id(p): number for number, few in enumerate(self._buckets) for p in few}
        self._begun, self._sent = 0, list[_Sent]()

    def backward(self, loss: Tensor, run: Callable[[Tensor], None] = Tensor.backward) -> None:
        """The last backward pass of this step: what becomes final in it is sent at once."""
        with self._watching():
            run(loss)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        hooks = [p.register_post_accumulate_grad_hook(self._is_final) for few in self._buckets for p in few]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _is_final(self, parameter: nn.Parameter) -> None:
        self._missing[self._of[id(parameter)]].discard(id(parameter))
        while self._begun < len(self._buckets) and not self._missing[self._begun]:
            self._send()

    def _send(self) -> None:
        few = self._buckets[self._begun]
        flags = torch.ones(len(few), dtype=few[0].dtype, device=few[0].device)
        for number, parameter in enumerate(few):
            # a gradient that is missing here counts as zero where another process has one
            if parameter.grad is None:
                flags[number] = 0
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in few]
        flat = torch.cat([*(g.flatten() for g in grads), flags])
        for parameter in few:
            parameter.grad = None
        self._sent.append(_Sent(few, flat, torch.distributed.all_reduce(flat, async_op=True)))
        self._begun += 1

    def finish(self) -> None:
        """Send the rest, wait for all, and put the sums where the gradients were; one nobody has stays None."""
        while self._begun < len(self._buckets):
            self._send()
        while self._sent:
            # not kept: for all weights of a model it is as much again
            sent = self._sent.pop(0)
            sent.work.wait()
            *sums, flags = sent.flat.split([*(p.numel() for p in sent.parameters), len(sent.parameters)])
            for parameter, total, flag in zip(sent.parameters, sums, flags.tolist(), strict=True):
                # laid out as the parameter is: one kernel for all of them goes through memory in its order
                parameter.grad = torch.empty_like(parameter).copy_(total.view_as(parameter)) if flag else None


class AddedElsewhere:
    """One process alone, or one whose gradients the sharding adds up itself."""

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self.backward, self.finish = None, finish


def of_shards(parameters: Sequence[nn.Parameter], size: int) -> AddedElsewhere:
    """FSDP adds gradients up as their mean; made the sum of ``size`` processes."""

    def to_sum() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= size

    return AddedElsewhere(to_sum)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Last parameters first: a backward pass comes to them first."""
    size = min(LARGEST, max(SMALLEST, sum(p.numel() for p in parameters) // 16))
    few: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        if few and (sum(p.numel() for p in few) + parameter.numel() > size or parameter.dtype != few[0].dtype):
            yield few
            few = []
        few.append(parameter)
    if few:
        yield few
