"""Prompts that a reward does not read to their end."""

from typing import Any


def unread(tokenizer: Any, prompts: list[str], limit: int | None = None) -> tuple[int, list[str]]:
    """The number of tokens that are read, and the prompts that are longer.

    Args:
        tokenizer: open_clip's, or one of transformers.
        limit: where it is not the tokenizer's own.
    """
    if not prompts:
        return limit or 0, []
    if (own := getattr(tokenizer, "context_length", None)) is not None:
        # open_clip's only cut: what one token more would change was cut
        limit = limit or int(own)
        read, longer = (tokenizer(prompts, context_length=length) for length in (limit, limit + 1))
        return limit, [p for p, a, b in zip(prompts, read, longer, strict=True) if not (a == b[:limit]).all()]
    limit = limit or int(tokenizer.model_max_length)
    ids = tokenizer(prompts, truncation=False, verbose=False).input_ids
    return limit, [prompt for prompt, some in zip(prompts, ids, strict=True) if len(some) > limit]
