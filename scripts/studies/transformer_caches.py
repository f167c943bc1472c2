"""l2c on top of chosen steps: SD 3 medium at full size, random weights, counted and timed beside the steps alone.

    OMP_NUM_THREADS=1 python scripts/studies/transformer_caches.py [--pixels 256] [--calls 6] [--ratio 0.25]

The transformer alone is there, in bf16; prompts are random numbers. Which units are left out is by chance: time
does not hang on it, and of quality random weights say nothing. Every other call is whole, as ``--gradients l2c`` has
it. CPU seconds of the calls of one picture without guidance, in turns.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from sdo_cli.drawing.draw import DrawSettings, Noise, make_path
from sdo_cli.drawing.pruned import made_for, skips_of, wiring_of
from sdo_cli.estimate.network import encoded
from sdo_cli.estimate.pipelines import meta_family
from sdo_cli.estimate.units import unit_flops
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource
from sdo_cli.prune.ratios import Budget, runs_at
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.skipping.skip_plan import SkipPlan

SD3 = ModelSource("stabilityai/stable-diffusion-3-medium-diffusers")


@torch.no_grad()
def with_random_weights() -> Family:
    family = meta_family(SD3, torch.bfloat16)
    transformer: nn.Module = family.denoiser.to_empty(device="cpu")
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, buffer in transformer.named_buffers():
        # positions
        assert name.endswith("pos_embed"), name
        buffer.normal_()
    return family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--calls", type=int, default=6, help="chosen steps")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of their computation that l2c leaves out")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    family, generator = with_random_weights(), torch.Generator().manual_seed(0)
    told = encoded(SD3, "bf16", 1)
    condition = {name: torch.randn(shape.shape, generator=generator).bfloat16() for name, shape in told.items()}
    side = given.pixels
    settings = DrawSettings(
        solver="flow-euler", num_inference_steps=given.calls, guidance_scale=1.0, height=side, width=side
    )
    with torch.no_grad():
        wiring = wiring_of(family, "parts", condition)
    flops = unit_flops(SD3, "parts", side, side)
    shares = torch.tensor([flops.units[name].all for name in wiring.units], dtype=torch.float64) / flops.call.all
    budget = Budget(shares, flops.rest.all / flops.call.all, wiring.inputs_reach_output)
    scores = torch.rand(given.calls, len(wiring.units), generator=generator)
    scores[::2] = 2.0
    plan = SkipPlan(
        made_for(family, settings), "parts", wiring, runs_at(given.ratio, scores, wiring, budget), {"made by": "chance"}
    )
    noise = Noise(torch.randn(1, *family.latent_shape(side, side), generator=generator), None)
    ways = {"chosen steps": None, "l2c on top": skips_of(plan, family, settings)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, skips in ways.items():
            start = time.process_time()
            with torch.no_grad():
                sample_latents(make_path(family, settings, noise, condition, None, skips=skips))
            seconds[name].append(time.process_time() - start)
    kept = budget.kept(plan.runs)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"SD 3 medium, {side} px, {given.calls} calls: computed {kept:.3f}, {1 / kept:.2f} times fewer FLOPs; "
        f"CPU s {seconds}; {statistics.fmean(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
