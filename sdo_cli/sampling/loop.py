"""Paths: a route with a network, a starting point and its noise. Sampling and every engine walk them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.sampling.coefficients import Coefficients, coefficients_of
from sdo_cli.sampling.route import CallNetwork, Route, walk
from sdo_cli.sampling.steering import Steered
from sdo_cli.skipping.walking import Skips

# denoise(x_scaled [R,…], t [R], rows [R]) -> e [R,…], after guidance
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# run_call(i, compute) -> the network's part of call i, which ``compute`` makes
RunCall = Callable[[int, Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Path:
    """A way from noise to the final latent.

    Attributes:
        x_0: latent at the route's start ``[B, C, h, w]``; initial noise is already times ``init_noise_sigma``.
        injected: standard normal noise ``[calls, B, C, h, w]`` when the route takes noise.
        base: the denoiser without its adapter, for the regulariser that stays near it.
        skips: units of the network that are left out at some calls; a call may repeat the one before.
        fast: draws in place of ``denoise``, which gradients are taken of: a few-step student, the denoiser its base.
    """

    route: Route
    denoise: Denoise
    x_0: Tensor
    injected: Tensor | None = None
    base: Denoise | None = None
    skips: Skips | None = None
    fast: Denoise | None = None

    def __post_init__(self) -> None:
        if self.route.takes_noise and self.injected is None:
            raise ValueError(f"{type(self.route.scheduler).__name__}, eta {self.route.eta}, needs the injected noise")

    @property
    def steered(self) -> Steered | None:
        """The denoiser, when its guidance is steered."""
        return self.denoise if isinstance(self.denoise, Steered) else None

    @property
    def outside(self) -> list[Tensor]:
        """What wants a gradient outside the network: the latent, injected noise, guidance scales."""
        found = [self.x_0, self.injected, self.steered.scale if self.steered else None]
        return [leaf for leaf in found if leaf is not None and leaf.requires_grad]

    @property
    def is_steered(self) -> bool:
        """Whether anything outside the network wants a gradient: then every input but the first carries a graph."""
        return bool(self.outside)

    def split(self, x: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """The network's part of a call; :meth:`join` makes the call's output of it."""
        return self.steered.split(x, t, rows) if self.steered else (self.denoise(x, t, rows),)

    def drawn(self, x: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`split`, of the network that draws."""
        return self.split(x, t, rows) if self.fast is None else (self.fast(x, t, rows),)

    def join(self, parts: tuple[Tensor, ...], t: Tensor, rows: Tensor) -> Tensor:
        return self.steered.join(parts, t, rows) if self.steered else parts[0]

    def begin(self) -> RunCall:
        """What runs the network's part of every call of one batch, in order: through ``skips`` where there are."""
        return self.skips.begin() if self.skips else lambda i, compute: compute()

    @property
    def draws_what_is_trained(self) -> bool:
        """Whether a call that is run again with a graph is the very function that drew."""
        return self.fast is None and (self.skips is None or self.skips.exact)

    @property
    def coefficients(self) -> Coefficients:
        return coefficients_of(self.route)

    @property
    def rows(self) -> Tensor:
        return torch.arange(self.x_0.shape[0], device=self.x_0.device)


def denoise_path(
    path: Path,
    call_network: CallNetwork,
    *,
    rows: Tensor | None = None,
    endpoint: Tensor | None = None,
    last: int | None = None,
) -> Tensor:
    """Walk the samples ``rows`` of a path (all by default); see :func:`sdo_cli.sampling.route.walk`."""
    if rows is None:
        return walk(path.route, path.x_0, call_network, injected=path.injected, endpoint=endpoint, last=last)
    injected = None if path.injected is None else path.injected[:, rows]
    return walk(path.route, path.x_0[rows], call_network, injected=injected, endpoint=endpoint, last=last)


@torch.no_grad()
def sample_latents(path: Path) -> Tensor:
    """``x_N`` without any graph."""
    rows, run = path.rows, path.begin()
    return denoise_path(path, lambda i, x, t: path.join(run(i, lambda: path.drawn(x, t, rows)), t, rows))
