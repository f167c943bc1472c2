"""What an image is made of beside the model: latent, condition, guidance scale, injected noise.

    x_m = r z        z of variance one, r the noise level of the route's start

Any of them can be a variable that is optimised; all of them together make the image again.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdo_cli.drawing.draw import DrawSettings, draw_noise, encode_pair, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.models.base import Family
from sdo_cli.sampling.guidance import Condition
from sdo_cli.sampling.loop import Path
from sdo_cli.sampling.route import Route, walk
from sdo_cli.sampling.steering import Steered


@dataclass(frozen=True)
class State:
    """Attributes:
    latent: z ``[B, C, h, w]``.
    condition: ``[1, B, …]`` each, or ``[levels, B, …]`` when every noise level has its own.
    scale: guidance scale, ``[1, B]`` or ``[levels, B]``.
    noise: injected at every call, ``[calls, B, C, h, w]``; None unless η > 0.
    """

    latent: Tensor
    condition: Condition
    scale: Tensor
    noise: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, each with the dimension of the samples that :func:`sample_dim` gives."""
        named = {"latent": self.latent, "guidance": self.scale}
        named |= {f"embedding.{key}": value for key, value in self.condition.items()}
        return named if self.noise is None else {**named, "noise": self.noise}

    def with_tensors(self, named: dict[str, Tensor]) -> "State":
        """Some of them replaced."""
        every = self.tensors() | named
        condition = {key: every[f"embedding.{key}"] for key in self.condition}
        return State(every["latent"], condition, every["guidance"], every.get("noise"))


def sample_dim(name: str) -> int:
    """Which dimension of a tensor of :meth:`State.tensors` counts samples."""
    return 0 if name == "latent" else 1


def names_of(variable: str, state: State) -> list[str]:
    """The tensors a variable of the recipe stands for."""
    kind = variable.removesuffix("-per-step")
    return [name for name in state.tensors() if name.partition(".")[0] == kind]


@dataclass(frozen=True)
class Canvas:
    """What stays as it is while some images are steered.

    Attributes:
        start: solver step at which the latent stands.
        negative: the unconditional side ``[B, …]``, None without guidance.
    """

    family: Family
    settings: DrawSettings
    start: int
    prompts: list[str]
    negative: Condition | None

    @property
    def route(self) -> Route:
        return replace(make_route(self.family, self.settings), start=self.start)

    def levels(self) -> Tensor:
        """Timesteps of the route, each once."""
        return torch.stack(list({value.item(): value for value in self.route.begin()[1]}.values()))

    def path(self, state: State) -> Path:
        """The way from the latent to the image; gradients of the latent are asked for where ``latent`` asks."""
        route = self.route
        x = (state.latent.detach() * route.noise_level).requires_grad_(state.latent.requires_grad)
        denoise = Steered(self.family.network, state.condition, self.negative, state.scale, self.levels())
        return Path(route, denoise, x, state.noise)


def first_state(canvas: Canvas, embed: PromptEmbeddings, generators: list[torch.Generator]) -> State:
    """Noise of these generators (as `sdo sample` draws it), walked without gradients to the canvas's start."""
    condition, _ = encode_pair(embed, canvas.settings, canvas.prompts)
    noise = draw_noise(canvas.family, canvas.settings, generators)
    shared = {key: value[None] for key, value in condition.items()}
    scale = noise.initial.new_full((1, len(canvas.prompts)), canvas.settings.guidance_scale)
    state = State(noise.initial, shared, scale, noise.injected)
    return state if canvas.start == 0 else _walked(canvas, state)


@torch.no_grad()
def _walked(canvas: Canvas, state: State) -> State:
    path = replace(canvas, start=0).path(state)
    call = path.route.call_of(canvas.start)
    x = walk(path.route, path.x_0, lambda i, x, t: path.denoise(x, t, path.rows), injected=path.injected, until=call)
    rest = None if state.noise is None else state.noise[call:]
    return replace(state, latent=x / canvas.route.noise_level, noise=rest)


def spread(state: State, variables: list[str], levels: int) -> State:
    """Condition and scale by noise level where a variable is per step."""
    condition, scale = state.condition, state.scale
    if "embedding-per-step" in variables:
        condition = {key: value.expand(levels, *value.shape[1:]) for key, value in condition.items()}
    if "guidance-per-step" in variables:
        scale = scale.expand(levels, -1)
    return replace(state, condition=condition, scale=scale)


def as_leaves(state: State, variables: list[str]) -> tuple[State, dict[str, list[Tensor]]]:
    """Copies that want gradients where they are variables; and these by variable."""
    chosen = {variable: names_of(variable, state) for variable in variables}
    moving = {name for names in chosen.values() for name in names}
    fresh = {name: _exact(value, wide=name in moving) for name, value in state.tensors().items()}
    leaves = {variable: [fresh[name].requires_grad_() for name in names] for variable, names in chosen.items()}
    return state.with_tensors(fresh), leaves


def _exact(value: Tensor, *, wide: bool) -> Tensor:
    """A copy; what is optimised is kept in at least fp32, where small steps are not lost."""
    # also its layout counts for the last bit of what is computed with it
    copy = value.detach().clone(memory_format=torch.contiguous_format)
    return copy.to(torch.promote_types(copy.dtype, torch.float32)) if wide else copy


def snapshot(state: State) -> State:
    """Copies without gradients."""
    return state.with_tensors({name: _exact(value, wide=False) for name, value in state.tensors().items()})


def put_rows(target: State, source: State, rows: Tensor) -> None:
    """Take these samples over, in place."""
    for name, value in target.tensors().items():
        other = source.tensors()[name].detach()
        if sample_dim(name) == 0:
            value[rows] = other[rows]
        else:
            value[:, rows] = other[:, rows]
