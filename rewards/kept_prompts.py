"""Embeddings of prompts, each made once and alone."""

from collections.abc import Callable

import torch
from torch import Tensor


class KeptPrompts:
    """A table of rows that does not depend on who asked for which prompts together.

    Products of matrices are summed in another order in a batch of another size. From the batch that first asked, a row
    would make a resumed run, which asks for less, differ in its last bits from one left alone.
    """

    def __init__(self, most: int | None = None) -> None:
        """``most`` rows are kept, the oldest go first; all if not given."""
        self._rows: dict[str, Tensor] = {}
        self._most = most

    def rows(self, prompts: list[str], embed: Callable[[str], Tensor]) -> Tensor:
        """``[B, D]``, without gradient; whatever shape a row has.

        Args:
            embed: one prompt to ``[1, D]``; asked once for each.
        """
        with torch.no_grad():
            for prompt in prompts:
                if prompt not in self._rows:
                    self._rows[prompt] = embed(prompt)[0]
        found = torch.stack([self._rows[prompt] for prompt in prompts])
        for oldest in list(self._rows)[: max(0, len(self._rows) - (self._most or len(self._rows)))]:
            del self._rows[oldest]
        return found

    def clear(self) -> None:
        """After the weights have moved or changed their precision."""
        self._rows.clear()
