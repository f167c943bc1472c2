"""The optimisation of a batch of images: a generator of steps that does no I/O."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdo_cli.errors import RecipeFault, TrainingFault
from sdo_cli.gradients.choice import inclusion, systematic
from sdo_cli.gradients.outcome import Outcome, Terms
from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.gradients.rules import find_rule
from sdo_cli.gradients.run import run_plan
from sdo_cli.recipe.steering_schema import Steering
from sdo_cli.sampling.coefficients import Coefficients
from sdo_cli.seeding import keyed_generator
from sdo_cli.steering.objectives import COMPARED, ImageObjective
from sdo_cli.steering.variables import Canvas, State, as_leaves, names_of, put_rows, sample_dim, snapshot, spread

# of what an image has to gain to count as better, relative to its best loss
FLAT = 1e-4
# gradients that were not finite in so many steps in a row end it
MOST_BAD_STEPS = 10
# fp16 gradients vanish without it
HALF_SCALE = 2.0**10


@dataclass(frozen=True)
class Step:
    """One look at all images of the batch, before they were changed.

    Attributes:
        losses: ``[B]``, the objective without priors.
        values: by objective, ``[B]``.
        images: ``[B, 3, H, W]``.
        calls: network calls per sample, as the engines count them.
        better: ``[B]``, which images are the best so far.
    """

    number: int
    losses: Tensor
    values: dict[str, Tensor]
    images: Tensor
    calls: dict[str, int]
    seconds: dict[str, float]
    better: Tensor


@dataclass
class Best:
    """The best state of every sample so far."""

    state: State
    losses: Tensor
    marks: Tensor
    steps: Tensor
    since: int = 0
    stopped: str = ""


def make_plan(spec: Steering, c: Coefficients, batch: int, generator: torch.Generator) -> Plan:
    """What the rule draws; plain ``sdo`` fits the variables.

    Latents keep the graph of the first call, embeddings that of one random call with weight 1/p; together the first
    call is certain and one other is drawn. Guidance and noise stand outside the network and need none.
    """
    if spec.rule != "sdo" or spec.rule_options:
        return _ruled(spec, c, batch, generator)
    latent = "latent" in spec.variables
    embedding = any(name.startswith("embedding") for name in spec.variables)
    mode, weight = empty(c.calls, batch)
    if embedding and (not latent or c.calls > 1):
        odds = torch.ones(c.calls, dtype=torch.float64)
        if latent:
            odds[0] = 0
        p = inclusion(odds, 1)
        drawn = systematic(p, batch, generator)
        mode.scatter_(0, drawn, Mode.WEIGHTS)
        weight = torch.where(mode > 0, (1 / p)[:, None], 0.0)
    if latent:
        mode[0], weight[0] = Mode.THROUGH, 1.0
    return Plan(mode, weight)


def _ruled(spec: Steering, c: Coefficients, batch: int, generator: torch.Generator) -> Plan:
    options = spec.rule_options
    if spec.rule == "sdo" and "embedding" not in " ".join(spec.variables):
        # no other call reaches a latent
        options = {"step_choice": "first", **options}
    plan = find_rule(spec.rule)(c.calls, batch, c, generator, **options)
    if plan.endpoint is not None or plan.repeats is not None:
        raise RecipeFault([f"rule: {spec.rule} looks at predictions or repeats instead of the image; choose another"])
    return plan


def nothing_yet(canvas: Canvas, spec: Steering, state: State) -> Best:
    """To be filled in by :func:`steer`."""
    count = len(canvas.prompts)
    whole, _ = as_leaves(spread(state, spec.variables, len(canvas.levels())), spec.variables)
    whole = snapshot(whole)
    infinite = torch.full((count,), torch.inf)
    return Best(whole, infinite, infinite.clone(), torch.zeros(count, dtype=torch.long))


def steer(canvas: Canvas, spec: Steering, state: State, objective: ImageObjective, best: Best) -> Iterator[Step]:
    """Look, then change, ``spec.steps`` times, and look once more: ``steps + 1`` results unless it gets flat.

    Args:
        state: to begin from; it is not changed.
        best: kept up to date, so that it is there however this ends.

    Raises:
        TrainingFault: the objective was not finite for several steps in a row.
    """
    batch = len(canvas.prompts)
    state, leaves = as_leaves(spread(state, spec.variables, len(canvas.levels())), spec.variables)
    optimizer = make_optimizer(spec, leaves)
    lengths = {name: _lengths(name, value) for name, value in state.tensors().items()}
    scale = HALF_SCALE if spec.mixed_precision == "fp16" else 1.0
    bad = torch.zeros(batch, dtype=torch.long)
    for number in range(spec.steps + 1):
        objective.step, objective.progress = number, number / spec.steps
        images: dict[int, Tensor] = {}
        objective.watch = lambda part, rows, images=images: images.update(zip(rows.tolist(), part, strict=True))
        last = number == spec.steps
        outcome = _look(canvas, spec, state, objective, number=number, scale=scale, last=last)
        values = _on_cpu(outcome.rewards)
        losses = values.pop(COMPARED, outcome.losses.cpu())
        better = _keep_best(best, state, losses, number, spec.patience)
        every = torch.stack([images[row] for row in range(batch)]).cpu()
        calls, seconds = outcome.calls, outcome.seconds
        yield Step(number, losses, values, every, calls, seconds, better)
        if last or best.stopped:
            return
        bad = torch.where(_change(spec, state, optimizer, scale), 0, bad + 1)
        if bool((bad >= MOST_BAD_STEPS).all()):
            raise TrainingFault(
                f"step {number}: the gradient of every image was not finite for {MOST_BAD_STEPS} steps in a row",
                remedy="lower learning_rate, or set mixed_precision=no",
            )
        if spec.renormalise:
            _renormalise(spec, state, lengths)


def _look(
    canvas: Canvas, spec: Steering, state: State, objective: ImageObjective, *, number: int, scale: float, last: bool
) -> Outcome:
    path, batch = canvas.path(state), len(canvas.prompts)
    if last:
        plan = Plan(*empty(path.route.calls, batch))
    else:
        generator = keyed_generator(spec.seed, "plan", number, objective.number)
        plan = make_plan(spec, path.coefficients, batch, generator)
    outcome = run_plan(path, plan, objective, terms=Terms(1.0, scale=scale), checkpointing=spec.checkpointing)
    if path.x_0.grad is not None:
        # x_m = r z
        state.latent.grad = canvas.route.noise_level * path.x_0.grad
    return outcome


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


def _keep_best(best: Best, state: State, losses: Tensor, number: int, patience: int) -> Tensor:
    """Which samples have their best image now; NaN is never best."""
    better = losses < best.losses
    # against the loss of the last change that counted: many small ones add up
    enough = losses < best.marks - FLAT * best.marks.abs().clamp(max=1e30)
    best.marks = torch.where(enough, losses, best.marks)
    best.since = 0 if bool(enough.any()) else best.since + 1
    rows = better.nonzero().flatten()
    put_rows(best.state, state, rows.to(state.latent.device))
    best.losses = torch.where(better, losses, best.losses)
    best.steps[better] = number
    if patience and best.since >= patience:
        best.stopped = f"no image got better for {best.since} steps"
    return better


def make_optimizer(spec: Steering, leaves: dict[str, list[Tensor]]) -> torch.optim.Optimizer:
    """Over every variable with its own rate; all of them treat each sample on its own."""
    groups = [{"params": tensors, "lr": spec.rate_of[name]} for name, tensors in leaves.items()]
    if spec.optimizer in ("sgd", "sgd-norm"):
        return torch.optim.SGD(groups, momentum=0.0)
    kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(spec.adam_beta1, spec.adam_beta2))


def _change(spec: Steering, state: State, optimizer: torch.optim.Optimizer, scale: float) -> Tensor:
    """One optimizer step; ``[B]``, which samples' gradients were finite: the others stay where they are."""
    named = {name: value for name, value in state.tensors().items() if value.grad is not None}
    good = torch.ones(len(state.latent), dtype=torch.bool)
    for name, value in named.items():
        assert value.grad is not None
        if name.startswith("embedding"):
            value.grad /= scale
        finite = _per_sample(name, torch.isfinite(value.grad), torch.all)
        good &= finite.flatten().cpu()
        value.grad = torch.where(finite, value.grad, 0.0)
        if spec.norm_prior and name in ("latent", "noise"):
            value.grad += spec.norm_prior * _prior_gradient(name, value)
        if spec.optimizer == "sgd-norm":
            value.grad /= _lengths(name, value.grad).clamp(min=1e-30)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return good


def _per_sample(name: str, value: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """``reduce`` over everything but the samples, in a shape that broadcasts."""
    dim = sample_dim(name)
    flat = reduce(value.transpose(0, dim).flatten(1), dim=1)
    return flat.view(*[1] * dim, -1, *[1] * (value.dim() - dim - 1))


def _lengths(name: str, value: Tensor) -> Tensor:
    """Norm of every sample's latent; of noise, of every call's."""
    if name == "noise":
        return value.detach().flatten(2).norm(dim=2).view(*value.shape[:2], *[1] * (value.dim() - 2))
    return _per_sample(name, value.detach(), torch.linalg.vector_norm)


def _prior_gradient(name: str, value: Tensor) -> Tensor:
    """Of ``-log p(‖z‖)`` with ``log p = (d - 1) log ‖z‖ - ‖z‖²/2``: the norm of d normal numbers (ReNO, 2406.04312)."""
    z = value.detach()
    d = math.prod(z.shape[1 if name == "latent" else 2 :])
    return z - (d - 1) * z / _lengths(name, z).square()


@torch.no_grad()
def _renormalise(spec: Steering, state: State, lengths: dict[str, Tensor]) -> None:
    """Latents and noise get their first norm again (DOODL, arXiv 2303.13703)."""
    for variable in spec.variables:
        for name in names_of(variable, state):
            if name in ("latent", "noise"):
                value = state.tensors()[name]
                value *= lengths[name] / _lengths(name, value)
