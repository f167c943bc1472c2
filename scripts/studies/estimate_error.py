"""The estimator's seconds against measured ones, stage by stage, on this machine; prints a Markdown table.

    python scripts/studies/estimate_error.py small                     (the embedded model)
    python scripts/studies/estimate_error.py full --folder /tmp/full   (SD 1.5; scripts/full_size_step.py makes it)
    python scripts/studies/estimate_error.py published                 (named GPUs against diffusers' own benchmark)

A shared machine changes its pace by the minute: every step is held against a speed measured right before it, and the
medians of some rounds are shown. With OMP_NUM_THREADS=1 and --clock cpu seconds are those the process was running, not
those it waited for its neighbours.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from full_size_step import RECIPE  # noqa: E402

from sdo_cli.doctor.advice import estimate_recipe  # noqa: E402
from sdo_cli.doctor.target import find_target, measured  # noqa: E402
from sdo_cli.estimate import measuring  # noqa: E402
from sdo_cli.estimate.cost import META, count  # noqa: E402
from sdo_cli.estimate.gpus import find_gpu  # noqa: E402
from sdo_cli.estimate.network import encoded  # noqa: E402
from sdo_cli.estimate.pipelines import plain_family  # noqa: E402
from sdo_cli.estimate.stages import Estimate  # noqa: E402
from sdo_cli.gradients import outcome  # noqa: E402
from sdo_cli.models.load import ModelSource  # noqa: E402
from sdo_cli.recipe.load import LoadedRecipe, load_recipe  # noqa: E402
from sdo_cli.training.job import Job  # noqa: E402
from sdo_cli.training.loop import train  # noqa: E402
from sdo_cli.training.prepare import prepare  # noqa: E402

HALF = ["mixed_precision=bf16", "reward_precision=bf16"]
SMALL = {
    "embedded, sdo, batch 1": ["train_batch_size=1"],
    "embedded, sdo, batch 8": ["train_batch_size=8"],
    "embedded, sdo, batch 16": ["train_batch_size=16", "num_inference_steps=10"],
    "embedded, draft-k, batch 8": ["gradient.rule=draft-k", "num_inference_steps=10"],
    "embedded, full, batch 8": ["gradient.rule=full", "num_inference_steps=5"],
    "embedded, train: full, batch 8": ["train=full", "num_inference_steps=10"],
    "embedded, bf16, batch 1": [*HALF, "train_batch_size=1", "num_inference_steps=4"],
}
# stages of a step to the engines' names of them
PARTS = {"rollout": ("rollout",), "score": ("score",), "shortcut": ("shortcut",), "graph": ("forward", "backward")}
# guided calls of SD 1.5 at 512 pixels in fp16 per second, torch 2.0 without compiling, by batch size
# (huggingface/diffusers, docs/source/en/optimization/torch2.0.md)
PUBLISHED = {
    "T4": {1: 6.9, 4: 1.79, 16: 1 / 2.34},
    "V100 16GB": {1: 18.99, 4: 5.96, 16: 1.66},
    "A100 40GB": {1: 21.66, 4: 11.6, 16: 3.04},
    "RTX 3090": {1: 22.56, 4: 6.46, 16: 1.70},
    "RTX 4090": {1: 40.5, 4: 12.62, 16: 3.17},
}


def compare(name: str, loaded: LoadedRecipe, rounds: int) -> None:
    """Lines of the table for one recipe: medians over the rounds after the first step."""
    target = find_target(None)
    found = estimate_recipe(loaded, target)
    steps = timed_steps(prepare(loaded)[0])
    # the first step pays for what later ones find ready
    next(steps)
    real: list[dict[str, float]] = []
    told: list[dict[str, float]] = []
    for _ in range(rounds):
        pace = measured(target, loaded.recipe).speed
        assert pace is not None
        real.append(next(steps))
        told.append({stage.name: stage.work.seconds(pace) for stage in found.stages if stage.each_step})
    show(name, found, real, told)


def timed_steps(job: Job) -> Iterator[dict[str, float]]:
    """Seconds by stage; the optimizer's are what the engines do not account for."""
    results = train(job)
    while True:
        start = outcome.time.perf_counter()
        result = next(results)
        total = outcome.time.perf_counter() - start
        seconds = {stage: sum(map(result.seconds.__getitem__, parts)) for stage, parts in of(result.seconds)}
        yield {**seconds, "optimizer": total - sum(seconds.values())}


def of(seconds: dict[str, float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    return ((stage, parts) for stage, parts in PARTS.items() if set(parts) <= set(seconds))


def show(name: str, found: Estimate, real: list[dict[str, float]], told: list[dict[str, float]]) -> None:
    real = [{**row, "step": sum(row.values())} for row in real]
    told = [{**row, "step": sum(row.values())} for row in told]
    for stage in (*(stage.name for stage in found.stages if stage.each_step), "step"):
        was, said = (median(row[stage] for row in rows) for rows in (real, told))
        ratios = sorted(b[stage] / a[stage] for a, b in zip(real, told, strict=True))
        spread = f"{ratios[0]:.2f} … {ratios[-1]:.2f}"
        print(f"| {name} | {stage} | {was:.3g} | {said:.3g} | {median(ratios):.2f} | {spread} |", flush=True)


def small(rounds: int) -> None:
    for name, words in SMALL.items():
        compare(
            name,
            load_recipe("quickstart", [f"max_train_steps={rounds + 1}", "validation.num_prompts=4", *words]),
            rounds,
        )


def full(kind: str, folder: Path, rounds: int, precision: str) -> None:
    path = folder / f"{kind}.yaml"
    path.write_text(RECIPE.format(folder=folder, kind=kind, pixels=256))
    words = [f"mixed_precision={precision}", f"reward_precision={precision}", f"max_train_steps={rounds + 1}"]
    compare(f"{kind}, 256 px, 2 steps, {precision}", load_recipe(str(path), words), rounds)


@torch.no_grad()
def published() -> None:
    source = ModelSource("stable-diffusion-v1-5/stable-diffusion-v1-5")
    family = plain_family(source, torch.float16)
    print("| GPU | batch | published ms a call | estimated | estimated / published |\n|---|---|---|---|---|")
    for name, rates in PUBLISHED.items():
        for batch, rate in rates.items():
            rows = 2 * batch
            x = torch.empty(rows, *family.latent_shape(None, None), device=META)
            t, condition = torch.empty(rows, device=META, dtype=torch.long), encoded(source, "fp16", rows)
            work = count(lambda x=x, t=t, condition=condition: family.network(x, t, condition)).work
            said = work.seconds(find_gpu(name).speed)
            print(f"| {name} | {batch} | {1000 / rate:.1f} | {1000 * said:.1f} | {said * rate:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["small", "full", "published"])
    parser.add_argument("--kind", choices=["sd15", "sdxl"], default="sd15")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    given = parser.parse_args()
    if given.clock == "cpu":
        # the engines' stopwatch and the measuring of speed read the same
        outcome.time = measuring.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    if given.what == "published":
        return published()
    print("| job | stage | measured s | estimated s | estimated / measured | rounds |\n|---|---|---|---|---|---|")
    if given.what == "small":
        return small(given.rounds)
    return full(given.kind, given.folder, given.rounds, given.precision)


if __name__ == "__main__":
    main()
