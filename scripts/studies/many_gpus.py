"""The arithmetic of docs/many-gpus.md: what processes send each other, what they wait for, what checkpoints hold.

    python scripts/studies/many_gpus.py [--gpu "A100 80GB"]

Everything is counted or computed by the project's own functions; nothing here was timed on several GPUs.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from sdo_cli.doctor.advice import estimate_recipe
from sdo_cli.doctor.target import Target, find_target
from sdo_cli.estimate.momentum import product_bytes
from sdo_cli.estimate.network import NetworkSetup, Recompute, call_cost, live_cost, optimizer_bytes, weights_of
from sdo_cli.recipe.load import LoadedRecipe, load_recipe

JOBS = {
    "SD 1.5, LoRA rank 8": ("aesthetic", ["lora.rank=8"]),
    "SD 1.5, LoRA rank 64": ("aesthetic", ["lora.rank=64"]),
    "SD 1.5, train: full": ("aesthetic", ["train=full"]),
    "SD 1.5, train: full, mofasgd": ("aesthetic", ["train=full", "optimizer=mofasgd"]),
    "SDXL, LoRA rank 8": ("sdxl-hps", ["lora.rank=8"]),
    "SDXL, LoRA rank 64": ("sdxl-hps", ["lora.rank=64"]),
    "SDXL, train: full": ("sdxl-hps", ["train=full"]),
    "SDXL, train: full, mofasgd": ("sdxl-hps", ["train=full", "optimizer=mofasgd"]),
}
# bytes per second of one process's link, one way: line rates
LINKS = {"10 GbE": 1.25e9, "100 Gb": 12.5e9, "NVLink 3": 300e9}
PROCESSES = (2, 8, 64)


@dataclass(frozen=True)
class Counted:
    """One job on one GPU.

    Attributes:
        sent: bytes each process gives to the sum of an optimizer step (fp32): gradients, or mofasgd's products.
        weights: bytes of what is trained, which the running mean takes again.
        state: bytes of the optimizer's.
        step: estimated seconds.
        hideable: of them, the last backward pass of the network, which alone can run beside sending.
    """

    sent: int
    weights: int
    state: int
    step: float
    hideable: float
    needed: int


def ring(moved: float, processes: int, link: float) -> float:
    """Seconds of a ring all-reduce: each sends and receives 2 (n - 1) / n of the bytes (without latency)."""
    return 2 * (processes - 1) / processes * moved / link


def expected_max(processes: int, spread: float, draws: int = 4000) -> float:
    """Mean of the slowest of n normal step times of mean 1 and this standard deviation, by drawing (seed 0)."""
    generator = random.Random(0)
    return mean(max(generator.gauss(1, spread) for _ in range(processes)) for _ in range(draws))


def count_job(loaded: LoadedRecipe, target: Target) -> Counted:
    found, weights = estimate_recipe(loaded, target), weights_of(NetworkSetup.of(loaded.recipe))
    speed = target.speed
    assert speed is not None and found.is_known(speed)
    trained, rank = 4 * sum(weights.trained), loaded.recipe.optimizer_rank
    low = loaded.recipe.optimizer == "mofasgd"
    return Counted(
        product_bytes(weights.matrices, rank) + 4 * weights.others if low else trained,
        trained,
        optimizer_bytes(weights, loaded.recipe.optimizer, rank),
        found.step_seconds(speed),
        last_backward(loaded, target),
        target.needed(found.peak),
    )


def last_backward(loaded: LoadedRecipe, target: Target) -> float:
    """Of the last live call: what it takes with its backward pass, less the call alone."""
    assert target.speed is not None
    setup, recipe = NetworkSetup.of(loaded.recipe), loaded.recipe
    rows = recipe.gradient.shortcut_micro_batch or recipe.train_batch_size
    blocks = Recompute(blocks=recipe.gradient_checkpointing)
    live = live_cost(setup, rows, through=False, recompute=blocks, again=True)
    return live.work.seconds(target.speed) - call_cost(setup, rows).work.seconds(target.speed)


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.{0 if value > 0.01 else 2}f} ms"


def sizes(jobs: dict[str, Counted]) -> None:
    titles = ["job", "sent a step", "optimizer state", "in a checkpoint", "with running mean", "GPU memory", "step"]
    print(f"| {' | '.join(titles)} | last backward |")
    print("|---" * 8 + "|")
    for name, job in jobs.items():
        kept = job.weights + job.state
        mb = [f"{size / 1e6:,.1f} MB" for size in (job.sent, job.state, kept, kept + job.weights)]
        print(
            f"| {name} | {' | '.join(mb)} | {job.needed / 1e9:.1f} GB | {seconds(job.step)} | {seconds(job.hideable)} |"
        )


def sending(jobs: dict[str, Counted]) -> None:
    titles = [f"{link}, n={n}" for link in LINKS for n in PROCESSES]
    print("| job | " + " | ".join(titles) + " |\n|---" * 1 + "|---" * len(titles) + "|")
    for name, job in jobs.items():
        times = [ring(job.sent, n, rate) for rate in LINKS.values() for n in PROCESSES]
        print(f"| {name} | " + " | ".join(f"{seconds(t)} ({t / job.step:.2%})" for t in times) + " |")


def waiting() -> None:
    print("| spread of step times | " + " | ".join(f"n={n}" for n in PROCESSES) + " |\n|---|---|---|---|")
    for spread in (0.01, 0.05, 0.1):
        row = " | ".join(f"{expected_max(n, spread) - 1:.1%}" for n in PROCESSES)
        print(f"| {spread:.0%} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="A100 80GB")
    target = find_target(None, parser.parse_args().gpu)
    jobs = {name: count_job(load_recipe(recipe, words), target) for name, (recipe, words) in JOBS.items()}
    print(f"Estimated for one {target.name}, never timed.\n")
    sizes(jobs)
    print("\nRing all-reduce, and its share of a step:\n")
    sending(jobs)
    print("\nWhat the slowest of n adds to the mean step:\n")
    waiting()


if __name__ == "__main__":
    main()
