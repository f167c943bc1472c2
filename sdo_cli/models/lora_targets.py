"""Which layers of a denoiser a LoRA is put beside."""

from torch import nn

from sdo_cli.models.base import Family


def targets_of(family: Family, layers: str, named: list[str] | tuple[str, ...] | None) -> list[str]:
    """Names, or ends of names, of the denoiser's layers that get an adapter.

    Args:
        layers: ``attention`` or ``all``; see ``lora.layers``.
        named: ``lora.target_modules``, which go first.
    """
    if named:
        return list(named)
    return every_layer(family.denoiser) if layers == "all" else list(family.lora_targets)


def every_layer(denoiser: nn.Module) -> list[str]:
    """Full names of all linear layers and convolutions inside its blocks: not those that embed or read out, nor what
    an adapter has put beside them."""
    blocks = [name for name, _ in denoiser.named_children() if name.endswith(("_block", "_blocks"))]
    return [
        name.removesuffix(".base_layer")
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.split(".")[0] in blocks and ".lora_" not in name
    ]


def nowhere(part: nn.Module, targets: list[str]) -> list[str]:
    """Of the ends of module names those that no layer has."""
    layers = [name for name, _ in part.named_modules()]
    return [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]


def said(missing: list[str], source: str, known: list[str]) -> str:
    """A problem of ``lora.target_modules``."""
    return f"lora.target_modules: {', '.join(missing)} names no layer of {source}; try {', '.join(known)}"
