"""Two rewards that disagree, dark pictures against the prompt: where pictures end by weight, normalised, by rule.

    OMP_NUM_THREADS=1 python scripts/studies/two_that_disagree.py

Nothing is trained: the final latents of eight pictures are moved by Adam through decoder and both rewards, so what a
rule does to a picture is seen alone. `darkness` is minus a hundred times a picture's mean brightness; `clip` wants what
the prompt says, of which the background's colour is a part. Means over the pictures, less those before; the judge only
measures.
"""

import argparse
from dataclasses import replace

import torch

from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import CombineSpec
from sdo_cli.scoring.rewards import build_reward
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.objective import RewardObjective, WeightedReward
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import prepare
from sdo_cli.training.spreads import Spreads

RECIPE = ["rollout={}", "train_batch_size=8", "num_inference_steps=10", "max_train_steps=1", "rewards=[clip]"]
RECIPE += ["validation.prompts={}", "validation.rewards=[]"]
ARMS = {
    "sum": CombineSpec("none", "none", True),
    "spread": CombineSpec("spread", "none", True),
    "spread, projection": CombineSpec("spread", "projection", True),
    "spread, mgda": CombineSpec("spread", "mgda", True),
}


class Darkness:
    def score(self, images, prompts):
        return -100 * images.mean((1, 2, 3))


def moved(objective, spreads, x, steps, rate):
    """The latents after so many steps; the objective keeps what it saw of the gradients."""
    x, rows = x.clone().requires_grad_(), torch.arange(len(x))
    if spreads is not None:
        with torch.no_grad():
            spreads.add(objective(x, rows).rewards)
    optimizer = torch.optim.Adam([x], lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        scored = objective(x, rows)
        scored.losses.sum().backward()
        optimizer.step()
        if spreads is not None and step:
            spreads.add(scored.rewards)
    return x.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="0.25,1,4")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.05)
    options = parser.parse_args()
    job, _ = prepare(load_recipe("quickstart", RECIPE))
    order = PromptOrder(job.prompts, 0)
    x, prompts = accumulate(job, order, 0)[0].x_N.detach(), [order.at(row) for row in range(8)]
    clip, judge = job.rewards[0].reward, build_reward("judge", {}, torch.device("cpu"))

    @torch.no_grad()
    def measured(x):
        images = job.family.decode(x)
        return [reward.score(images, prompts).mean().item() for reward in (Darkness(), clip, judge)]

    before = measured(x)
    print("| weight of darkness | arm | darkness | clip-embedded | judge | cosine at the first and last step |")
    print("|--:|---|--:|--:|--:|--:|")
    for weight in map(float, options.weights.split(",")):
        for arm, combine in ARMS.items():
            spreads = Spreads() if combine.normalise == "spread" else None
            items = [WeightedReward("clip", clip, 1.0), WeightedReward("darkness", Darkness(), weight)]
            objective = RewardObjective(job.family, items, prompts, combine=combine)
            if spreads is not None:
                objective = replace(objective, spread=spreads.of)
            after = measured(moved(objective, spreads, x, options.steps, options.rate))
            gains = " | ".join(f"{b - a:+.3f}" for a, b in zip(before, after, strict=True))
            cosines = [objective.looks[at]["clip|darkness"].mean().item() for at in (0, -1)]
            print(f"| {weight:g} | {arm} | {gains} | {cosines[0]:+.2f}, {cosines[1]:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
