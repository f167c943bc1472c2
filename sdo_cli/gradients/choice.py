"""Drawing K of N calls per sample with given probabilities."""

import torch
from torch import Tensor


def inclusion(odds: Tensor, k: int) -> Tensor:
    """Probability of each call to be among the K drawn, ``[calls]``, proportional to ``odds`` but at most 1.

    Calls that would be drawn more than once are certain, the others share what is left. Sums to K.
    """
    p = torch.zeros_like(odds)
    certain = torch.zeros_like(odds, dtype=torch.bool)
    while True:
        rest = odds * ~certain
        total = rest.sum()
        left = k - int(certain.sum())
        # nothing else has odds: K calls there are not, take the others evenly
        share = rest / total if total > 0 else (~certain).double() / (~certain).sum()
        p = torch.where(certain, 1.0, left * share)
        over = p > 1 + 1e-12
        if not bool(over.any()):
            return p.clamp(max=1.0)
        certain |= over


def systematic(p: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Systematic sampling: K = Σp distinct calls per sample, offsets stratified over the batch. ``[K, B]``

    Call i is drawn with probability ``p_i``; over the batch each call comes up as evenly as it can.
    """
    k = round(p.sum().item())
    strata = torch.randperm(batch, generator=generator, dtype=torch.long).double()
    offset = (strata + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch
    position = torch.arange(k, dtype=torch.float64)[:, None] + offset[None]
    edges = p.cumsum(0)
    # rounding must not make the last call unreachable or a call without odds the last
    edges = edges * (k / edges[-1])
    return torch.searchsorted(edges, position, right=True).clamp(max=int(p.nonzero().max()))


def independent(calls: int, batch: int, k: int, generator: torch.Generator) -> Tensor:
    """K distinct calls per sample, every call equally likely, independent between samples. ``[K, B]``"""
    order = torch.rand(calls, batch, generator=generator, dtype=torch.float64).argsort(0)
    return order[:k]


def dealt(rows: Tensor, updates: int, generator: torch.Generator) -> Tensor:
    """To which of several updates each of a sample's calls goes, ``rows`` being ``[updates · K, B]``; as ``rows``.

    Each call is as likely to come first as last, each update gets K of a sample's calls, as far from each other as
    they can be, and those of the whole batch are spread over the way.
    """
    place = rows[0].argsort(stable=True).argsort()
    first = torch.randint(updates, (1,), generator=generator)
    return (torch.arange(len(rows))[:, None] + place[None] + first) % updates
