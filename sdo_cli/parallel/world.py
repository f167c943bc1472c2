"""The processes of one job and what they tell each other, through accelerate. One process is the usual case.

Every method but ``fail`` and the properties is collective: all processes call it, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sdo_cli.device import pick_device
from sdo_cli.errors import EnvironmentFault, Stopped
from sdo_cli.parallel.launch import tell_launcher
from sdo_cli.parallel.peers import Peers, connect
from sdo_cli.parallel.shards import Sharding, asked_for
from sdo_cli.parallel.zero import Zero, zero_asked_for

if TYPE_CHECKING:
    import torch

    from sdo_cli.parallel.adding import AddedElsewhere, Adding

T = TypeVar("T")

# how long a process waits for the others where all must meet; those that died are noticed at once
PATIENCE = timedelta(hours=6)
NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Attributes:
    rank: of this process, 0 for the one that writes files and talks.
    size: number of processes.
    sharding: how a model that is trained whole is cut up among them; None: each has all of it.
    zero: how its optimizer is dealt out among them; None: each has all of it.
    """

    rank: int = 0
    size: int = 1
    peers: Peers = field(default_factory=Peers, compare=False)
    sharding: Sharding | None = None
    zero: Zero | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether the model is in shards: all must make the same network calls in the same order."""
        return self.sharding is not None

    @property
    def in_step(self) -> bool:
        """Whether all must make the same backward passes in the same order."""
        return self.sharded or (self.zero is not None and self.zero.stage == 2)

    @property
    def dealt_out(self) -> bool:
        """Whether it takes all of them to put together what is trained and its optimizer."""
        return self.sharded or self.zero is not None

    def rounds(self, count: int) -> Iterator[range]:
        """``count`` numbered pieces of work in rounds: in each every process has at most one, see :meth:`mine`."""
        for first in range(0, count, self.size):
            yield range(first, min(first + self.size, count))

    def mine(self, number: int) -> bool:
        """Whether piece ``number`` of work that is dealt out in turn is this process's."""
        return number % self.size == self.rank

    def gather(self, value: T) -> list[T]:
        """One value of every process, in their order, on all of them; tensors in it must be on the CPU."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them; the others do not call ``make``."""
        if self.size == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [make() if self.is_main else None]
        broadcast_object_list(box)
        return box[0]

    def largest(self, number: int) -> int:
        """The largest of the processes' whole numbers."""
        if self.size == 1:
            return number
        import torch
        from accelerate import PartialState

        box = torch.tensor([number], device=PartialState().device)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box.item())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def adding(self, parameters: "Sequence[torch.nn.Parameter]") -> "Adding | AddedElsewhere":
        """What adds up every process's gradients, on all of them; DeepSpeed does so itself, in passes or step."""
        from sdo_cli.parallel.adding import AddedElsewhere, Adding, of_shards

        if self.size == 1 or self.zero is not None:
            return AddedElsewhere()
        return of_shards(parameters, self.size) if self.sharded else Adding(parameters)

    def add_gradients(self, parameters: "Sequence[torch.nn.Parameter]") -> None:
        """Every process's gradients added up, on all of them; one nobody has stays None. Of shards, each its own."""
        self.adding(parameters).finish()

    def make_same(self, parameters: "Sequence[torch.nn.Parameter]") -> None:
        """The first process's values everywhere; shards are of weights that all read from the same files."""
        if self.size > 1 and not self.sharded:
            import torch

            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, 0)


SINGLE = World()


@contextmanager
def joined(*, shards: bool = False) -> Iterator[World]:
    """The processes that were started for this job, by torchrun's usual environment variables; else this one alone.

    When the block ends well, or all stop together, nobody leaves before all have come to its end. After another error
    ``peers.fail`` tells them.

    Args:
        shards: whether the job can work on a model in shards, or with its optimizer dealt out.

    Raises:
        EnvironmentFault: some of the variables are missing, or accelerate's configuration asks for what cannot be done.
    """
    sharding, zero = asked_for(), zero_asked_for()
    if (sharding or zero) and not shards:
        raise EnvironmentFault(
            f"accelerate's configuration asks for {'FSDP' if sharding else 'DeepSpeed'}, which is for sdo finetune "
            "with train: full",
            remedy="start with --gpus N, or choose multi-GPU in `accelerate config`: each process keeps a whole model",
        )
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield SINGLE
        return
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise EnvironmentFault(
            f"WORLD_SIZE is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
            remedy="start with `sdo … --gpus N`, `accelerate launch`, torchrun, or set all of " + ", ".join(NEEDED),
        )
    tell_launcher()
    world = _join(sharding, zero)
    try:
        yield world
    except Stopped:
        _leave(world)
        raise
    _leave(world)


def _leave(world: World) -> None:
    from accelerate import PartialState

    world.wait()
    world.peers.leave()
    PartialState().destroy_process_group()


def _join(sharding: Sharding | None, zero: Zero | None) -> World:
    from accelerate import PartialState

    state = PartialState(cpu=pick_device().type == "cpu", timeout=PATIENCE)
    alone = World(state.process_index, state.num_processes)
    return World(alone.rank, alone.size, connect(alone.rank, alone.size, alone.share), sharding, zero)
