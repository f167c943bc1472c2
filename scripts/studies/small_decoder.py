"""How near a small decoder's gradient at the final latents is to the own decoder's, by reward (docs/gradients.md).

python scripts/studies/small_decoder.py [--batches 3] [recipe overrides …]
"""

import argparse
import statistics

import torch
from torch import Tensor

from sdo_cli.device import pick_device
from sdo_cli.models.tiny_decoder import load_tiny_decoder
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import path_of
from sdo_cli.training.objective import RewardObjective, WeightedReward
from sdo_cli.training.prepare import prepare, reward_of

REWARDS = ("clip-embedded", "aesthetic-embedded", "colorfulness", "jpeg-compressibility")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rewards", default=",".join(REWARDS))
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    loaded = load_recipe(
        "quickstart", ["rollout={}", "validation.prompts={}", "validation.rewards=[]", *given.overrides]
    )
    job, _ = prepare(loaded)
    order, name = PromptOrder(job.prompts, 0), loaded.recipe.tiny_decoder or "embedded:tiny"
    decoders = {
        "tiny": load_tiny_decoder(name, job.family, only_jacobian=False),
        "tiny-jacobian": load_tiny_decoder(name, job.family, only_jacobian=True),
    }
    drawn = []
    for step in range(given.batches):
        prompts = [order.at(step * job.global_batch + row) for row in range(job.global_batch)]
        drawn.append((sample_latents(path_of(job, step, range(job.global_batch), prompts)), prompts))
    for word in given.rewards.split(","):
        try:
            reward = reward_of(RewardSpec(word), loaded.recipe, pick_device())
        except KeyError:
            continue
        weighted = [WeightedReward(word, reward, 1.0)]

        def gradient(
            decode: object, x_N: Tensor, prompts: list[str], weighted: list = weighted
        ) -> tuple[Tensor, float]:
            leaf = x_N.clone().requires_grad_()
            scored = RewardObjective(job.family, weighted, prompts, decode)(leaf, torch.arange(len(leaf)))
            (found,) = torch.autograd.grad(scored.losses.sum(), leaf)
            return found.flatten(1), -scored.losses.mean().item()

        for kind, decode in decoders.items():
            cosines, ratios, gaps = [], [], []
            for x_N, prompts in drawn:
                (own, score), (small, other) = gradient(None, x_N, prompts), gradient(decode, x_N, prompts)
                cosines += torch.cosine_similarity(own, small, 1).tolist()
                ratios += (small.norm(dim=1) / own.norm(dim=1)).tolist()
                gaps.append(score - other)
            near = f"cosine {statistics.fmean(cosines):.3f} (worst {min(cosines):.3f})"
            size = f"norm ratio {statistics.fmean(ratios):.2f}"
            print(f"{word:20} {kind:14} {near}  {size}  own decoder's reward less this {statistics.fmean(gaps):+.4f}")


if __name__ == "__main__":
    main()
