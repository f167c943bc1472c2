"""What one process of several does in tests/test_parallel.py and tests/test_sharded.py: draws and the first gradient, …

RANK=0 WORLD_SIZE=2 … python tests/several.py draws OUT key=value …
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from sdo_cli.optimizers import mofasgd
from sdo_cli.optimizers.together import Together
from sdo_cli.parallel import adding
from sdo_cli.parallel.world import World, joined
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training import job as job_draws
from sdo_cli.training import loop, passes
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.prepare import prepare


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def draws(world: World, out: Path, words: list[str]) -> None:
    """By number of the slice: noise, prompts, plan; and the gradient of the first step."""
    job, _ = prepare(load_recipe("quickstart", words), world)
    seen, real_noise, real_run = [], job_draws.draw_noise, passes.run_plan

    def draw_noise(family, settings, generators):
        noise = real_noise(family, settings, generators)
        seen.append({"noise": digest(noise.initial)})
        return noise

    def run_plan(path, plan, objective, **how):
        seen[-1] |= {"prompts": objective.prompts, "mode": plan.mode.tolist(), "weight": plan.weight.tolist()}
        return real_run(path, plan, objective, **how)

    job_draws.draw_noise, passes.run_plan = draw_noise, run_plan
    # away from zero, where half of a fresh adapter has no gradient
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in job.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    passes.accumulate(job, PromptOrder(job.prompts, job.recipe.seed), 0)
    world.add_gradients(job.parameters)
    slices = dict(zip(job_draws.slices_of(job), seen, strict=True))
    (out / f"draws-{world.rank}.json").write_text(json.dumps(slices))
    gradient = torch.cat([p.grad.flatten() for p in job.parameters])
    torch.save(gradient, out / f"gradient-{world.rank}.pt")


def add(world: World, out: Path, words: list[str]) -> None:
    """Gradients that only some have; parameters that differ; numbers and objects."""
    shapes = ((3, 2), (5,), (2,))
    parameters = [nn.Parameter(torch.full(shape, float(world.rank))) for shape in shapes]
    world.make_same(parameters)
    assert all(bool((p == 0).all()) for p in parameters)
    parameters[0].grad = torch.full((3, 2), 1.0 + world.rank)
    # the second has one on the last process only, the third nowhere
    if world.rank == world.size - 1:
        parameters[1].grad = torch.arange(5.0)
    world.add_gradients(parameters)
    assert parameters[0].grad.tolist() == [[sum(range(1, world.size + 1))] * 2] * 3
    assert parameters[1].grad.tolist() == [0, 1, 2, 3, 4]
    assert parameters[2].grad is None
    assert world.gather(world.rank * 10) == [10 * rank for rank in range(world.size)]
    assert world.largest(7 - world.rank) == 7
    assert world.share(lambda: f"of {world.rank}") == "of 0"
    (out / f"added-{world.rank}").write_text("well")


def overlap(world: World, out: Path, words: list[str]) -> None:
    """What is sent before the last backward pass is over; a pass that misses a parameter here and another there."""
    adding.SMALLEST = 1
    names = ("first", "second", "third", "fourth")

    def step(*used: str) -> tuple[list[int], list[list[float]]]:
        parameters = {name: nn.Parameter(torch.ones(3)) for name in names}
        for parameter in parameters.values():
            # of an earlier pass
            parameter.grad = torch.full((3,), 10.0)
        together, sent, x = world.adding(list(parameters.values())), [], torch.ones(3)
        for name in used:
            x = x * parameters[name]
            x.register_hook(lambda g: sent.append(together._begun))
        together.backward((world.rank + 1) * x.sum())
        sent.append(together._begun)
        together.finish()
        return sent, [p.grad.tolist() for p in parameters.values()]

    sent, sums = step(*names)
    # hooks fire from the last parameter to the first, each after those behind it were sent
    assert sent == [0, 1, 2, 3, 4], sent
    assert sums == [[10.0 * world.size + sum(range(1, world.size + 1))] * 3] * 4
    mine = [name for name in names if name != names[1 + world.rank]]
    sent, sums = step(*mine)
    assert sent[-1] == 2 - world.rank, sent
    shares = [sum(rank + 1 for rank in range(world.size) if names[1 + rank] != name) for name in names]
    assert sums == [[10.0 * world.size + share] * 3 for share in shares]
    kernel = nn.Parameter(torch.arange(54.0).view(2, 3, 3, 3).to(memory_format=torch.channels_last))
    together = world.adding([kernel])
    together.backward((kernel * kernel.detach()).sum())
    together.finish()
    # one kernel steps through memory in order, so gradients lie as their parameters do; nothing is kept
    assert kernel.grad.stride() == kernel.stride() and not together._sent
    assert torch.equal(kernel.grad, world.size * kernel.detach())
    (out / f"overlapped-{world.rank}").write_text("well")


def shards(world: World, out: Path, words: list[str]) -> None:
    """How many elements of the model, of its gradients and of the optimizer's state lie here."""
    job, _ = prepare(load_recipe("quickstart", words), world)
    stepper, kept = loop.Stepper(job.recipe, job.parameters), {}
    real = stepper.step

    def step(number, bad_reward=None):
        kept["gradients"] = sum(p.grad.to_local().numel() for p in job.parameters)
        return real(number, bad_reward)

    stepper.step = step
    next(loop.train(job, stepper=stepper))
    states = [value for state in stepper.optimizer.state.values() for value in state.values() if value.dim()]
    kept["mine"] = sum(p.to_local().numel() for p in job.parameters)
    kept["whole"] = sum(p.numel() for p in job.parameters)
    kept["optimizer"] = sum(value.to_local().numel() for value in states)
    (out / f"shards-{world.rank}.json").write_text(json.dumps(kept))


def dealt(world: World, out: Path, words: list[str]) -> None:
    """How many elements of the optimizer's state and of the gradients lie here when DeepSpeed steps."""
    job, _ = prepare(load_recipe("quickstart", words), world)
    stepper, kept = loop.make_stepper(job), {}
    real = stepper.dealt.step

    def step():
        kept["gradients"] = sum(p.grad.numel() for p in job.parameters if p.grad is not None)
        return real()

    stepper.dealt.step = step
    next(loop.train(job, stepper=stepper))
    states = [value for state in stepper.optimizer.state.values() for value in state.values() if value.dim()]
    kept["optimizer"] = sum(value.numel() for value in states)
    kept["whole"] = sum(p.numel() for p in job.parameters)
    (out / f"dealt-{world.rank}.json").write_text(json.dumps(kept))


def momentum(world: World, out: Path, words: list[str]) -> None:
    """Two steps of the recipe: bytes given to sums in each, the first one's gradients as they were summed, weights."""
    job, _ = prepare(load_recipe("quickstart", words), world)
    stepper, sent, sums = loop.make_stepper(job), [0], {}
    real_sum, real_step = torch.distributed.all_reduce, stepper.step

    def all_reduce(tensor, *how, **more):
        sent[-1] += tensor.numel() * tensor.element_size()
        return real_sum(tensor, *how, **more)

    def step(number, bad_reward=None):
        done = real_step(number, bad_reward)
        sent.append(0)
        return done

    if stepper.dealt is not None:
        real_norm = stepper.dealt._norm

        def norm(groups):
            grads = [holder.grad for holder in (*stepper.dealt._bases, *stepper.dealt.others)]
            sums.setdefault("sums", torch.cat([grad.flatten() for grad in grads if grad is not None]))
            return real_norm(groups)

        stepper.dealt._norm = norm
    torch.distributed.all_reduce, stepper.step = all_reduce, step
    try:
        norms = [result.grad_norm for result in loop.train(job, stepper=stepper)]
    finally:
        torch.distributed.all_reduce = real_sum
    kept = torch.cat([parameter.detach().flatten() for parameter in job.parameters])
    torch.save({**sums, "weights": kept, "norms": torch.tensor(norms)}, out / f"momentum-{world.rank}.pt")
    (out / f"sent-{world.rank}.json").write_text(json.dumps(sent[:-1]))


def signs(world: World, out: Path, words: list[str]) -> None:
    """Machines whose decompositions have other signs: bases are the same everywhere after each step, and weights."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    recipe = load_recipe("quickstart", ["train=full", "optimizer=mofasgd", "optimizer_rank=2"]).recipe
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    dealt = mofasgd.MoFaSGD(recipe, world, matrices=[layer.weight], parameters=[layer.weight], adamw=adamw)
    real = Together.step

    def step(together, *given):
        S, along = real(together, *given)
        if world.rank:
            for tensor in (*together.bases, *along):
                tensor.neg_()
        return S, along

    Together.step = step
    for _ in range(3):
        dealt.backward(layer(torch.randn(4, 8)).square().sum())
        dealt.step()
        (matrix,) = dealt.matrices
        for mine in (*matrix.tensors, layer.weight.detach()):
            assert all(torch.equal(mine, other) for other in world.gather(mine.clone()))
    (out / f"signs-{world.rank}").write_text("well")


def sick():
    """`sdo`, where the rewards of the second process are not finite at their second call in training."""
    import test_checkpoints

    from sdo_cli.cli.app import main
    from sdo_cli.training import prepare as preparing

    real = preparing.reward_of
    if os.environ["RANK"] == "1":
        preparing.reward_of = lambda *a: test_checkpoints.Sometimes(real(*a), [3])
    main()


def saving():
    """`sdo`, where a search of gates is kept after every second update."""
    from sdo_cli.cli.app import main
    from sdo_cli.prune import scores as pruning

    pruning.SAVE_EVERY = 2
    main()


def counting():
    """`sdo prune`, which writes how much of what a process did itself."""
    from sdo_cli.cli.app import main
    from sdo_cli.prune import measure, schedules, search

    counts = {}

    def counted(place, name):
        real = getattr(place, name)

        def call(*given):
            counts[name] = counts.get(name, 0) + 1
            return real(*given)

        setattr(place, name, call)

    for place, name in ((search, "shortcut_update"), (measure._Gallery, "pictures"), (schedules, "_output")):
        counted(place, name)
    try:
        main()
    finally:
        Path(f"counts-{os.environ['RANK']}.json").write_text(json.dumps(counts))


class Steep:
    """A reward whose third gradient is not finite, though its value is."""

    def __init__(self, reward):
        self.reward, self.calls = reward, 0

    def score(self, images, prompts):
        self.calls += 1
        cliff = (images.flatten(1).sum(1) * 0).sqrt() if self.calls == 3 else 0
        return self.reward.score(images, prompts) + cliff


def steep():
    """`sdo`, where a gradient of the second process is not finite in its second step."""
    from sdo_cli.cli.app import main
    from sdo_cli.training import prepare as preparing

    real = preparing.reward_of
    if os.environ["RANK"] == "1":
        preparing.reward_of = lambda *a: Steep(real(*a))
    main()


def launching():
    """`sdo`, which takes a light worker for itself when it starts others."""
    from sdo_cli.cli.app import main

    sys.argv[0] = os.environ["SDO_TEST_WORKER"]
    main()


def main():
    with joined(shards=True) as world:
        calls = {"draws": draws, "add": add, "overlap": overlap, "shards": shards, "dealt": dealt}
        calls |= {"momentum": momentum, "signs": signs}
        calls[sys.argv[1]](world, Path(sys.argv[2]), sys.argv[3:])
