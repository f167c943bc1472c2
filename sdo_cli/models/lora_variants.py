"""LoRAs of one model, loaded once each, of which one at a time is on: side by side without loading the model again."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sdo_cli.models.base import Family
from sdo_cli.models.lora_carried import weighted_dora
from sdo_cli.models.lora_stack import stack_of


@dataclass(frozen=True)
class _Loaded:
    """Attributes:
    names: of its adapters, one for each LoRA of a stack.
    weights: of each in the stack.
    reads_text: it changes a text encoder, so prompts mean something else under it.
    """

    names: list[str]
    weights: list[float]
    reads_text: bool


class LoraVariants:
    """Load every LoRA that is asked for, all of them off.

    Args:
        wanted: LoRAs (or stacks, ``a:0.8+b``) and the weights they are to have.

    Raises:
        EnvironmentFault: one is not there, was made for another model, or takes none of these weights.
    """

    def __init__(self, family: Family, wanted: Iterable[tuple[str, float]]) -> None:
        self._family = family
        self._loaded: dict[str, _Loaded] = {}
        scales: dict[str, list[float]] = defaultdict(list)
        for lora, scale in wanted:
            scales[lora].append(scale)
        for number, (lora, some) in enumerate(scales.items()):
            self._loaded[lora] = self._load(lora, f"variant{number}", some)
        self.switch(None, 0.0)

    def _load(self, lora: str, adapter: str, scales: list[float]) -> _Loaded:
        stack = stack_of(lora)
        self._family.load_lora(lora, adapter=adapter, scale=scales[0])
        names = [f"{adapter}_{number}" if number else adapter for number in range(len(stack))]
        for name, one in zip(names, stack, strict=True):
            # loading looked at the first weight alone
            weight = next((scale * one.scale for scale in scales if scale * one.scale != 1), 1.0)
            if weight != 1 and any(name in layer.lora_magnitude_vector for layer in self._every_layer()):
                raise weighted_dora(one.path, weight)
        encoders = list(self._layers(*self._family.text_encoders.values()))
        reads_text = any(name in layer.scaling for layer in encoders for name in names)
        return _Loaded(names, [one.scale for one in stack], reads_text)

    def reads_text(self, lora: str | None) -> bool:
        """Whether prompts have to be encoded with this LoRA on."""
        return lora is not None and self._loaded[lora].reads_text

    def switch(self, lora: str | None, scale: float) -> None:
        """Exactly this LoRA at this weight is on from here; None: the plain model. The others wait on the CPU."""
        on = {} if lora is None else self._weights(self._loaded[lora], scale)
        for layer in self._every_layer():
            here = layer.get_base_layer().weight.device
            for name in layer.scaling:
                for halves in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    if name in halves:
                        halves[name].to(here if name in on else "cpu")
            # peft's own switch would also give them gradients
            layer._active_adapter = [name for name in on if name in layer.scaling]
            for name in layer._active_adapter:
                layer.set_scale(name, on[name])

    def _weights(self, loaded: _Loaded, scale: float) -> dict[str, float]:
        return {name: scale * weight for name, weight in zip(loaded.names, loaded.weights, strict=True)}

    def _every_layer(self) -> Iterator[Any]:
        return self._layers(self._family.denoiser, *self._family.text_encoders.values())

    def _layers(self, *parts: Any) -> Iterator[Any]:
        from peft.tuners.lora import LoraLayer

        return (module for part in parts for module in part.modules() if isinstance(module, LoraLayer))
