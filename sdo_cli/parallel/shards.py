"""A model in shards: FSDP 2, as accelerate's own configuration describes it, around one network.

`accelerate launch` hands its ``fsdp_config`` to the processes as ``FSDP_*`` variables, and accelerate's plugin reads
them. torch's ``fully_shard`` is applied here rather than by accelerate, which turns FSDP on for GPUs only.

Each process keeps a part of every parameter, its gradient and its optimizer state. Before a module computes, all
processes send each other their parts: so all must make the same network calls in the same order.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdo_cli.errors import EnvironmentFault, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# of accelerate's configuration: what stands in for those that are not carried out
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "set it to false; use more processes if the shards do not fit"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "set it to false, and gradient_checkpointing=true in the recipe",
    ),
    "FSDP_FORWARD_PREFETCH": ("fsdp_forward_prefetch", "set it to false; FSDP 2 has none"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", "take it out: everything that is trained is sharded"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "take it out: all processes share one set of shards"),
}
# read by transformers, whose models are not the ones that are sharded here
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass(frozen=True)
class Sharding:
    """What accelerate's configuration says.

    Attributes:
        plugin: accelerate's reading of it.
    """

    plugin: Any

    def shard(self, model: "nn.Module", device: "torch.device", precision: "torch.dtype") -> None:
        """Cut ``model`` into shards, unit by unit moved to ``device``.

        Parameters stay as they are. In half ``precision`` they are sent and computed with in it, and gradients are
        added up in fp32.

        Raises:
            EnvironmentFault: classes to wrap that this model does not have.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = precision != torch.float32
        how = {
            "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
            "reshard_after_forward": self.plugin.reshard_after_forward,
            # a timestep must not be rounded: inputs stay as they are
            "mp_policy": MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
            if half
            else MixedPrecisionPolicy(),
        }
        for unit in (*self._units(model), model):
            fully_shard(unit, **how)

    def _units(self, model: "nn.Module") -> "list[nn.Module]":
        """The modules whose parameters are gathered together, innermost first."""
        from torch import nn

        if self.plugin.transformer_cls_names_to_wrap is None:
            # those the model names, where it has them: a family of models shares one list
            there = {type(module).__name__ for module in model.modules()}
            named = getattr(model, "_no_split_modules", None) or ()
            self.plugin.transformer_cls_names_to_wrap = [name for name in named if name in there]
        try:
            # from names of classes to classes
            self.plugin.set_auto_wrap_policy(model)
        except ValueError as fault:
            raise EnvironmentFault(
                f"accelerate's configuration: {first_line(fault)}",
                remedy="take fsdp_transformer_layer_cls_to_wrap out: the model knows its own blocks",
            ) from fault
        policy, units, taken = self.plugin.auto_wrap_policy, [], set()
        # parents come before their children in modules()
        for module in reversed(list(model.modules())[1:] if policy is not None else []):
            free = [parameter for parameter in module.parameters() if parameter not in taken]
            if not free or isinstance(module, nn.ModuleList | nn.ModuleDict):
                continue
            if policy(module=module, recurse=False, nonwrapped_numel=sum(p.numel() for p in free)):
                units.append(module)
                taken.update(free)
        return units


def asked_for() -> Sharding | None:
    """How accelerate's configuration wants models sharded, None if it does not.

    Raises:
        EnvironmentFault: it asks for what cannot be done here.
    """
    if _on("ACCELERATE_USE_MEGATRON_LM"):
        raise EnvironmentFault(
            "accelerate's configuration asks for MEGATRON_LM, which has models and a backward pass of its own",
            remedy="choose FSDP in `accelerate config` (fsdp_version: 2); train: full",
        )
    if not _on("ACCELERATE_USE_FSDP"):
        return None
    if (version := os.environ.get("FSDP_VERSION") or "1") != "2":
        raise EnvironmentFault(
            f"accelerate's configuration asks for FSDP {version}, and sdo shards with version 2 only",
            remedy="fsdp_version: 2 under fsdp_config (FSDP_VERSION=2 without a configuration file)",
        )
    for variable, (name, remedy) in REFUSED.items():
        if os.environ.get(variable, "false").lower() not in ("", "false", "0", "no"):
            raise EnvironmentFault(f"accelerate's configuration has {name}, which sdo cannot do", remedy=remedy)
    # transformers would leave the text encoders and rewards of all but the first process empty
    os.environ[LOADING] = "false"
    return Sharding(_plugin())


def _plugin() -> Any:
    from accelerate.utils import FullyShardedDataParallelPlugin

    try:
        return FullyShardedDataParallelPlugin(fsdp_version=2)
    # a TypeError of one that does not know version 2
    except (ValueError, KeyError, ImportError, TypeError) as fault:
        raise EnvironmentFault(
            f"accelerate's configuration of FSDP: {first_line(fault)}",
            remedy="see docs/clusters.md for one that works; accelerate must be 1.6 or newer",
        ) from fault


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def in_shards(tensor: "Tensor") -> bool:
    # DTensor's module takes a second to import, which a single process need not pay
    return hasattr(tensor, "full_tensor")


def whole(tensor: "Tensor") -> "Tensor":
    """A tensor that may be in shards, put together; then all processes call it."""
    if not in_shards(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def as_laid_out(tensor: "Tensor", like: "Tensor") -> "Tensor":
    """A whole tensor, which every process has, in the shards of ``like`` if that is in shards."""
    if not in_shards(like) or in_shards(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def described(model: "nn.Module", processes: int) -> str:
    """How a model is cut up."""
    from torch.distributed.fsdp import FSDPModule

    units = [type(module).__name__.removeprefix("FSDP") for module in model.modules() if isinstance(module, FSDPModule)]
    names = ", ".join(dict.fromkeys(units[1:]))
    inner = f" and {len(units) - 1} units inside ({names})" if names else " as one unit: see fsdp_auto_wrap_policy"
    return f"FSDP: {units[0]}{inner}; each process keeps 1/{processes} of every weight"


def forget_gathered(model: "nn.Module") -> None:
    """Drop weights that were gathered from the shards and kept: the shards have changed."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
