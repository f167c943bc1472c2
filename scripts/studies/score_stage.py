"""Peak memory of the score stage at full size with random weights, by what the reward sees, and what is estimated.

    python scripts/full_size_step.py --kind sd15 --folder F --only-make
    OMP_NUM_THREADS=1 python scripts/studies/score_stage.py --folder F [--pixels 512] [--rows 1] [--kinds full,latent]

``full``: CLIP ViT-L/14 on pictures of the own decoder; ``tiny-jacobian``: the same, and back through a small one;
``latent``: lrm-1.5, which sees the latent. fp32, each in a process of its own; memory is resident memory above what was
there before the stage, after a first score with all of its parts on one row without gradients.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from full_size_step import resident  # noqa: E402

from sdo_cli.estimate.scoring import RewardSetup, ScoreSetup, score_cost  # noqa: E402
from sdo_cli.models.load import ModelSource, load_family  # noqa: E402
from sdo_cli.models.tiny_decoder import load_tiny_decoder  # noqa: E402
from sdo_cli.recipe.load import load_recipe  # noqa: E402
from sdo_cli.scoring.rewards import build_reward  # noqa: E402
from sdo_cli.training.objective import RewardObjective, WeightedReward  # noqa: E402

KINDS = ("full", "tiny-jacobian", "latent")
# channels of SD 1.5's ways down and of its middle, and the numbers of its text encoder
FEATURES, WORDS = 320 + 640 + 1280 + 1280 + 1280, 768


def latent_reward(folder: Path) -> dict[str, str]:
    """The folder of lrm-1.5 around the pipeline's own UNet and text encoder."""
    place = folder / "lrm"
    if not (place / "state_dict.pt").exists():
        place.mkdir(exist_ok=True)
        for name in ("unet", "text_encoder"):
            (place / name).symlink_to(folder / "sd15" / name)
        table = {
            "visual_projection": {"weight": torch.randn(WORDS, FEATURES) / FEATURES**0.5},
            "text_projection": {"weight": torch.randn(WORDS, WORDS) / WORDS**0.5},
            "logit_scale": torch.tensor(2.6),
        }
        torch.save(table, place / "state_dict.pt")
    return {"model": str(place)}


def measure(kind: str, folder: Path, pixels: int, rows: int) -> None:
    torch.manual_seed(0)
    clip = {"model": "ViT-L-14-quickgelu", "pretrained": str(folder / "clip-l14.safetensors")}
    name, options = ("lrm-1.5", latent_reward(folder)) if kind == "latent" else ("clip-score", clip)
    small = {"decoder": kind, "tiny_decoder": str(folder / "taesd")} if kind == "tiny-jacobian" else {}
    words = [f"model={folder}/sd15", f"height={pixels}", f"width={pixels}", "mixed_precision=no"]
    words += [f"{key}={value}" for key, value in small.items()]
    recipe = load_recipe("hps", [*words, "reward_precision=no", "guard={}", "validation={}"]).recipe
    told = score_cost(ScoreSetup.of(recipe, (RewardSetup.of(name, options),)), rows)
    family = load_family(ModelSource(f"{folder}/sd15"))
    decode = load_tiny_decoder(small["tiny_decoder"], family, only_jacobian=True) if small else None
    rewards = [WeightedReward(name, build_reward(name, options, torch.device("cpu")), 1.0)]

    def score(x: torch.Tensor) -> torch.Tensor:
        objective = RewardObjective(family, rewards, ["a lighthouse in thick fog"] * len(x), decode)
        return objective(x, torch.arange(len(x))).losses.sum()

    x = torch.randn(rows, 4, pixels // 8, pixels // 8)
    with torch.no_grad():
        # every weight has been read by then
        score(x[:1, :, :8, :8])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    leaf = x.requires_grad_()
    (g,) = torch.autograd.grad(score(leaf), leaf)
    print(
        json.dumps(
            {
                "kind": kind,
                "rows": rows,
                "pixels": pixels,
                "GB": round((resident("VmHWM") - before) / 1e9, 2),
                "estimated GB": round(told.peak / 1e9, 2),
                "TFLOP": round(told.flops / 1e12, 2),
                "CPU s": round(time.process_time() - start, 1),
                "finite": bool(g.isfinite().all()),
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--here", action="store_true", help="in this process")
    given = parser.parse_args()
    for kind in given.kinds.split(","):
        if given.here:
            measure(kind, given.folder, given.pixels, given.rows)
        else:
            size = ["--pixels", str(given.pixels), "--rows", str(given.rows), "--folder", str(given.folder)]
            subprocess.run([sys.executable, __file__, "--kinds", kind, "--here", *size], check=True)


if __name__ == "__main__":
    main()
