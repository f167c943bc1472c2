"""Gates that are learned: a table of logits, or DiP-GO's pruner network; hard forward, soft backward."""

import torch
from torch import Tensor, nn

# how far "keep" is ahead at the start
AHEAD = 1.0


class LogitTable(nn.Module):
    """One pair of logits per (call, unit): the honest baseline of the pruner network."""

    def __init__(self, calls: int, units: int) -> None:
        super().__init__()
        self.ahead = nn.Parameter(torch.full((calls, units), AHEAD))

    def forward(self) -> Tensor:
        """``[calls, units]``: logit of keeping minus logit of skipping."""
        return self.ahead


class PrunerNetwork(nn.Module):
    """DiP-GO's pruner (arXiv 2410.16942, section 3.3): a query per (call, unit), attention over a call's units, an MLP
    to two logits.

    Args:
        width: of the queries.
        generator: of the initial weights.
    """

    def __init__(self, calls: int, units: int, *, width: int = 64, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(0.02 * torch.randn(calls, units, width))
            layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))
        with torch.no_grad():
            last = self.head[-1]
            assert isinstance(last, nn.Linear)
            last.bias.copy_(torch.tensor([AHEAD, 0.0]))

    def forward(self) -> Tensor:
        keep, skip = self.head(self.encoder(self.queries)).unbind(-1)
        return keep - skip


PRUNERS: dict[str, type[LogitTable] | type[PrunerNetwork]] = {"table": LogitTable, "attention": PrunerNetwork}


def straight_through(ahead: Tensor) -> Tensor:
    """Gates of exactly 0 or 1 with the gradient of the softmax over (keep, skip) at temperature 1.

    The first call's are 1: it computes everything.
    """
    soft = torch.sigmoid(ahead)
    hard = (ahead > 0).to(soft)
    gates = hard - soft.detach() + soft
    # exact ones: (1 - s) + s may be off by a rounding
    gates = gates + (hard - gates).detach()
    return torch.cat([torch.ones_like(gates[:1]), gates[1:]])
