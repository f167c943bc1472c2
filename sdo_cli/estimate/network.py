"""Cost of prompt encoding, of a guided network call and of a live one (with its backward pass)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdo_cli.device import dtype_of
from sdo_cli.estimate.cost import META, Cost, count
from sdo_cli.estimate.momentum import momentum_bytes
from sdo_cli.estimate.pipelines import bytes_of, meta_family, plain_family
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource, source_of
from sdo_cli.models.lora_targets import targets_of
from sdo_cli.optimizers.mofasgd import matrices_of
from sdo_cli.recipe.schema import Recipe
from sdo_cli.sampling.guidance import Guided

# bitsandbytes keeps tensors smaller than this in fp32, and one fp32 scale for every block of the others
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
# bytes of state: two moments; with where it began and a sum for the rate; a second point and one moment
PER_WEIGHT = {"adamw": 8, "prodigy": 16, "schedulefree": 8}


@dataclass(frozen=True)
class NetworkSetup:
    """Everything in a recipe that the cost of its network calls depends on."""

    source: ModelSource
    precision: str
    train_all: bool
    rank: int
    layers: str
    targets: tuple[str, ...] | None
    train_text: bool
    guided: bool
    negative_gradient: bool
    keep_near_base: bool
    height: int | None
    width: int | None

    @classmethod
    def of(cls, recipe: Recipe) -> "NetworkSetup":
        targets = recipe.lora.target_modules
        return cls(
            source=source_of(recipe),
            precision=recipe.mixed_precision,
            train_all=recipe.train == "full",
            rank=recipe.lora.rank,
            layers=recipe.lora.layers,
            targets=tuple(targets) if targets else None,
            train_text=recipe.lora.text_encoder,
            guided=recipe.guidance_scale > 1.0,
            negative_gradient=recipe.gradient.negative_gradient,
            keep_near_base=recipe.kl_weight > 0,
            height=recipe.height,
            width=recipe.width,
        )


@dataclass(frozen=True)
class Recompute:
    """What the backward pass of a live call runs again: diffusers' blocks, the whole call, or both."""

    blocks: bool = False
    call: bool = False


@dataclass(frozen=True)
class Weights:
    """Bytes of the parts, adapters included.

    Attributes:
        trained: number of elements of every trained tensor.
        matrices: rows and columns of those that mofasgd takes for matrices, where the whole denoiser is trained.
    """

    denoiser: int
    vae: int
    encoders: int
    trained: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...] = ()

    @property
    def others(self) -> int:
        """Elements of what is no matrix."""
        return sum(self.trained) - sum(m * n for m, n in self.matrices)


@lru_cache(maxsize=2)
def _open(setup: NetworkSetup) -> tuple[Family, list[nn.Parameter]]:
    """The family with its adapter, and what is trained."""
    family = meta_family(setup.source, dtype_of(setup.precision))
    if setup.train_all:
        family.denoiser.requires_grad_(True)
        return family, list(family.denoiser.parameters())
    parts = [(family.denoiser, targets_of(family, setup.layers, setup.targets))]
    if setup.train_text:
        parts += [(encoder, list(family.text_lora_targets)) for encoder in family.text_encoders.values()]
        family.train_text_encoders()
    return family, [parameter for part, targets in parts for parameter in _adapt(part, setup.rank, targets)]


def _adapt(part: Any, rank: int, targets: list[str]) -> list[nn.Parameter]:
    """A LoRA in fp32, as training keeps it."""
    from peft import LoraConfig

    part.add_adapter(LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))
    part.requires_grad_(False)
    adapter = [parameter for name, parameter in part.named_parameters() if "lora_" in name]
    for parameter in adapter:
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return adapter


@lru_cache(maxsize=64)
def weights_of(setup: NetworkSetup) -> Weights:
    """Resident bytes; the text encoders are freed before training unless they are trained."""
    family, trained = _open(setup)
    encoders = (getattr(family.pipeline, name, None) for name in family.encoder_names)  # type: ignore[attr-defined]
    return Weights(
        denoiser=bytes_of(family.denoiser),
        vae=bytes_of(family.vae),
        encoders=sum(bytes_of(encoder) for encoder in encoders if encoder is not None),
        trained=tuple(parameter.numel() for parameter in trained),
        matrices=_shapes(matrices_of(family.denoiser, trained)[0]) if setup.train_all else (),
    )


def _shapes(matrices: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((len(weight), weight[0].numel()) for weight in matrices)


def optimizer_bytes(weights: Weights, optimizer: str, rank: int = 0) -> int:
    """Both moments of AdamW, in fp32 or in 8 bits; of mofasgd its bases, and AdamW's moments of what is no matrix."""
    if optimizer == "mofasgd":
        return momentum_bytes(weights.matrices, rank) + 8 * weights.others
    if optimizer in PER_WEIGHT:
        return PER_WEIGHT[optimizer] * sum(weights.trained)
    scales = 4 / BLOCK_8BIT
    return sum(round(n * 2 * (1 + scales)) if n >= SMALLEST_8BIT else 8 * n for n in weights.trained)


@lru_cache(maxsize=64)
def encode_cost(setup: NetworkSetup, rows: int) -> Cost:
    """Prompt encoding of ``rows`` prompts at once."""
    family = plain_family(setup.source, dtype_of(setup.precision))
    return count(lambda: family.encode([str(row) for row in range(rows)]))


@lru_cache(maxsize=64)
def call_cost(setup: NetworkSetup, rows: int) -> Cost:
    """One guided network call for ``rows`` samples, without a graph."""
    family, _ = _open(setup)
    inputs = _Inputs(family, setup, rows)
    with torch.no_grad():
        return count(inputs.call)


@lru_cache(maxsize=64)
def live_cost(
    setup: NetworkSetup, rows: int, *, through: bool, recompute: Recompute, again: bool, freed: bool = False
) -> Cost:
    """A guided call with a graph and its backward pass.

    Args:
        through: gradients pass to the input too.
        again: gradients of an earlier pass are there and added to (they are not counted).
        freed: each gradient goes as soon as it is there.
    """
    family, trained = _open(setup)
    inputs = _Inputs(family, setup, rows, through=through)
    _set_blocks(family.denoiser, recompute.blocks)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if again else None
    hooks = [p.register_post_accumulate_grad_hook(_free) for p in trained] if freed else []
    cost = count(lambda: inputs.live(recompute.call))
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return cost


def _free(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=64)
def graph_bytes(setup: NetworkSetup, rows: int, *, recompute: Recompute) -> int:
    """What the graph of one live call holds until its backward pass."""
    family, _ = _open(setup)
    inputs = _Inputs(family, setup, rows, through=True)
    _set_blocks(family.denoiser, recompute.blocks)
    return count(lambda: inputs.forward(recompute.call)).left


def _set_blocks(denoiser: Any, wanted: bool) -> None:
    denoiser.enable_gradient_checkpointing() if wanted else denoiser.disable_gradient_checkpointing()


class _Inputs:
    """A guided network at one call, and what goes in."""

    def __init__(self, family: Family, setup: NetworkSetup, rows: int, *, through: bool = False) -> None:
        # the index stays on the CPU: it selects prompts by name when encoders are trained
        self.rows = torch.arange(rows)
        self.x = torch.empty(rows, *family.latent_shape(setup.height, setup.width), device=META, requires_grad=through)
        self.t = torch.empty(rows, device=META, dtype=torch.long)
        condition = (
            family.encode([str(row) for row in range(rows)])
            if setup.train_text
            else encoded(setup.source, setup.precision, rows)
        )
        negative = {key: value[:1].expand(rows, *value.shape[1:]) for key, value in condition.items()}
        scale = 2.0 if setup.guided and not family.takes_guidance else 1.0
        if family.takes_guidance:
            condition = family.with_guidance(condition, 2.0)
        self.denoise = Guided(family.network, condition, negative, scale, setup.negative_gradient)
        self.base = Guided(family.base_network, condition, negative, scale) if setup.keep_near_base else None

    def call(self) -> Tensor:
        return self.denoise(self.x, self.t, self.rows)

    def forward(self, recompute_call: bool) -> Tensor:
        if recompute_call:
            return checkpoint(self.denoise, self.x, self.t, self.rows, use_reentrant=False)
        return self.call()

    def live(self, recompute_call: bool) -> None:
        """As the engines send g back: a product in at least fp32 (sdo_cli/gradients/three_stage.py)."""
        direction, e = torch.empty_like(self.x).detach(), self.forward(recompute_call)
        total = (direction * e.float()).sum()
        if self.base is not None:
            with torch.no_grad():
                base = self.base(self.x.detach(), self.t, self.rows)
            total = total + (e - base).square().mean()
        total.backward()


@lru_cache(maxsize=16)
def encoded(source: ModelSource, precision: str, rows: int) -> dict[str, Tensor]:
    """Conditions of the right shape, from the model's own prompt encoding."""
    family = plain_family(source, dtype_of(precision))
    found: list[dict[str, Tensor]] = []
    count(lambda: found.append(family.encode([str(row) for row in range(rows)])))
    return found[0]
