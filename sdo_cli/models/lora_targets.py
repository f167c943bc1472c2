"""Which layers a LoRA's target modules name."""

from torch import nn


def nowhere(part: nn.Module, targets: list[str]) -> list[str]:
    """Of the ends of module names those that no layer has."""
    layers = [name for name, _ in part.named_modules()]
    return [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]


def said(missing: list[str], source: str, known: list[str]) -> str:
    """A problem of ``lora.target_modules``."""
    return f"lora.target_modules: {', '.join(missing)} names no layer of {source}; try {', '.join(known)}"
