"""Prompts to conditions, each encoded once; so the text encoders can be freed before anything else takes memory."""

from collections.abc import Iterable

import torch

from sdo_cli.models.base import Family
from sdo_cli.sampling.guidance import Condition

ENCODE_BATCH = 32
# SD 3's pipeline gives T5 this many, whatever its tokenizer would take
T5_TOKENS = 256


def cut_prompts(family: Family, prompts: Iterable[str]) -> list[str]:
    """A sentence for every kind of text encoder that does not read some prompts to their end; tokenizers are enough."""
    every, found = list(dict.fromkeys(prompts)), []
    for name, encoder in (("tokenizer", "CLIP"), ("tokenizer_2", "CLIP"), ("tokenizer_3", "T5")):
        tokenizer = getattr(family.pipeline, name, None)
        if tokenizer is None or not every:
            continue
        limit = T5_TOKENS if name == "tokenizer_3" else tokenizer.model_max_length
        lengths = [len(ids) for ids in tokenizer(every, truncation=False, verbose=False).input_ids]
        if longer := [i for i, length in enumerate(lengths) if length > limit]:
            first = every[longer[0]]
            shown = first if len(first) <= 40 else f"{first[:40]}…"
            found.append(
                f"{len(longer)} of {len(every)} prompts: {encoder} reads {limit} tokens and not what follows; "
                f"the first has {lengths[longer[0]]}: {shown}"
            )
    # two CLIP encoders read alike
    return list(dict.fromkeys(found))


class PromptEmbeddings:
    """Conditions of prompts, computed once each and kept on the CPU."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._kept: dict[str, Condition] = {}
        self._negative: dict[str, Condition] = {}

    def __call__(self, prompts: list[str]) -> Condition:
        """``[B, …]`` for each entry of the condition, on the model's device."""
        self._encode(prompts)
        keys = self._kept[prompts[0]].keys()
        return {key: self._here(torch.stack([self._kept[prompt][key] for prompt in prompts])) for key in keys}

    def negative(self, prompt: str, count: int) -> Condition:
        """The unconditional side of guidance for ``count`` samples."""
        if prompt not in self._negative:
            self._negative[prompt] = {k: v.cpu() for k, v in self.family.encode_negative(prompt).items()}
        return {k: self._here(v).expand(count, *v.shape[1:]) for k, v in self._negative[prompt].items()}

    def prepare(self, prompts: Iterable[str], negative: str, device: torch.device) -> None:
        """Encode these on ``device`` and free the text encoders; nothing else has to be there yet."""
        self.family.text_to(device)
        self._encode(list(prompts))
        self.negative(negative, 1)
        self.family.free_text_encoders()

    def _encode(self, prompts: list[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        for start in range(0, len(missing), ENCODE_BATCH):
            part = missing[start : start + ENCODE_BATCH]
            fresh = self.family.encode(part)
            for row, prompt in enumerate(part):
                # a copy of its own: a row alone would keep the whole batch alive
                self._kept[prompt] = {key: value[row].cpu().clone() for key, value in fresh.items()}

    def _here(self, value: torch.Tensor) -> torch.Tensor:
        """On the model's device; the names of prompts that are encoded at every call stay on the CPU."""
        return value.to(self.family.device) if value.is_floating_point() else value
