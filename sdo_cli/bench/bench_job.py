"""One set of loaded models that every variant runs on."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdo_cli.bench.variants import Variant
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.estimate.flops import count_flops
from sdo_cli.gradients.outcome import Outcome
from sdo_cli.gradients.plan import Plan
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.sampling.loop import Denoise
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job, path_of
from sdo_cli.training.lora import ADAPTER, add_lora
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import cheap_rollouts, check_plan, prepare, small_decoder
from sdo_cli.training.replays import Replays
from sdo_cli.training.validate import Validation


@dataclass
class Workbench:
    """Attributes:
    jobs: by variant; they share models, rewards, prompts and the adapter's parameters.
    validation: held-out prompts, None when the recipe has none.
    """

    jobs: dict[Variant, Job]
    validation: Validation | None
    order: PromptOrder

    @property
    def any_job(self) -> Job:
        """Any of them: what they share is the same in all."""
        return next(iter(self.jobs.values()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.any_job.parameters

    def gradient(self, variant: Variant, step: int, *, plan: Plan | None = None) -> list[Outcome]:
        """One backward pass of a variant on the noise and prompts of ``step``; gradients are added up."""
        job = self.jobs[variant]
        set_block_checkpointing(job, variant)
        return accumulate(job, self.order, step, plan=plan)

    def rollout(self, variant: Variant, number: int) -> Iterator[list[Outcome]]:
        """The backward passes of all updates on rollout ``number``, one after the other."""
        job, replays = self.jobs[variant], Replays(number)
        set_block_checkpointing(job, variant)
        for _ in range(job.recipe.rollout.updates):
            yield accumulate(job, self.order, number, replays=replays)
            replays.end_update(over=False)

    def leave_out(self, variant: Variant, reporter: Reporter) -> None:
        """A variant ran out of the GPU's memory: the others go on without it."""
        self.flat_gradient()
        torch.cuda.empty_cache()
        self.jobs = {other: job for other, job in self.jobs.items() if other != variant}
        reporter.note(
            f"{variant.name} does not fit into the GPU's memory: left out; lower train_batch_size to include it"
        )
        if not self.jobs:
            raise EnvironmentFault("no rule fits into the GPU's memory", remedy="lower train_batch_size")

    def flat_gradient(self) -> Tensor:
        """The parameters' gradients as one vector in float64 on the CPU; they are cleared."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts]).double().cpu()
        for parameter in self.parameters:
            parameter.grad = None
        return flat


def set_block_checkpointing(job: Job, variant: Variant) -> None:
    """diffusers' block checkpointing on for the variant that asks for it (or the recipe), off for the others."""
    wanted = variant.checkpointing(job.recipe) == "blocks"
    if wanted and not job.family.denoiser.is_gradient_checkpointing:
        job.family.denoiser.enable_gradient_checkpointing()
    if not wanted and job.family.denoiser.is_gradient_checkpointing:
        job.family.denoiser.disable_gradient_checkpointing()


def open_workbench(loaded: Mapping[Variant, LoadedRecipe]) -> Workbench:
    """Load models and rewards once, for the first variant, and hand them to all.

    Raises:
        RecipeFault: a variant's skip plan does not fit the model, or its rule cannot draw from the plan's calls.
    """
    first = next(iter(loaded.values()))
    job, validation = prepare(first)
    jobs = {variant: _job_of(variant, item, job) for variant, item in loaded.items()}
    return Workbench(jobs, validation, PromptOrder(job.prompts, first.recipe.seed))


def _job_of(variant: Variant, loaded: LoadedRecipe, shared: Job) -> Job:
    """Rollouts are a variant's own."""
    try:
        job = replace(
            shared,
            recipe=loaded.recipe,
            rollouts=cheap_rollouts(loaded, shared.family),
            decode=small_decoder(loaded.recipe, shared.family),
        )
        check_plan(job)
        if job.rollouts is not None and job.rollouts.network is not None:
            job.rollouts.share = fast_share(job)
    except RecipeFault as fault:
        raise RecipeFault(fault.problems, what=f"recipe with --rule {variant.name}") from fault
    return job


def fast_share(job: Job) -> float:
    """FLOPs of a call of the network that draws, over one of the network that is trained."""
    x = torch.zeros(1, *job.family.latent_shape(job.recipe.height, job.recipe.width), device=job.family.device)
    t, rows = torch.full((1,), 500, device=x.device), torch.zeros(1, dtype=torch.long, device=x.device)
    path = path_of(job, 0, range(1), job.prompts[:1])
    assert path.fast is not None

    def flops(denoise: Denoise) -> float:
        with torch.no_grad():
            return count_flops(lambda: denoise(x, t, rows))

    return flops(path.fast) / flops(path.denoise)


def new_adapter(bench: Workbench, seed: int, *, moved: float = 0.0) -> None:
    """A fresh adapter of this seed for all jobs.

    Args:
        moved: deviation of what is added to the zero-initialised halves: a fresh LoRA has no gradient in the other
            half, so gradients are compared at an adapter that has moved a little.
    """
    job = bench.any_job
    with warnings.catch_warnings():
        # peft says which other adapter it makes active; the fresh one is a line later
        warnings.simplefilter("ignore")
        job.family.denoiser.delete_adapters(ADAPTER)
    parameters = add_lora(job.family, job.recipe.lora, seed=seed)
    if moved:
        generator = keyed_generator(seed, "bench-adapter")
        with torch.no_grad():
            for parameter in parameters:
                if not bool(parameter.any()):
                    parameter.copy_(moved * torch.randn(parameter.shape, generator=generator))
    bench.jobs = {variant: replace(item, parameters=parameters) for variant, item in bench.jobs.items()}
