"""One SDO step of a full-size model with random weights on this machine; prints what it took as one line of JSON.

    python scripts/full_size_step.py --kind sd15 --folder F --only-make
    python scripts/full_size_step.py --kind sd15 --pixels 256 --folder F [recipe overrides …]

``decoder=tiny-jacobian tiny_decoder=F/taesd`` takes a small decoder, which --only-make makes too. Peak memory is this
process's resident memory above what importing took, so weights are in it; ``above_weights`` is without them, and
``estimated`` what ``sdo doctor`` says that is.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

RECIPE = """
model: {folder}/{kind}
rewards:
  - name: clip-score
    options: {{model: ViT-L-14-quickgelu, pretrained: {folder}/clip-l14.safetensors}}
prompts: {{lines: [a lighthouse in thick fog]}}
max_train_steps: 1
train_batch_size: 1
num_inference_steps: 2
guidance_scale: 5.0
height: {pixels}
width: {pixels}
mixed_precision: bf16
reward_precision: bf16
lora: {{rank: 8}}
"""


def make_weights(kind: str, folder: Path, device: str = "cpu") -> None:
    """A pipeline of the shipped full-size configs with random weights in bf16, and a random CLIP ViT-L/14.

    Args:
        device: where they are drawn; a GPU does it in a second.
    """
    import diffusers

    from sdo_cli.models.single_file import config_folder

    if not (folder / "clip-l14.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_clip(folder / "clip-l14.safetensors", device)
    if not (folder / "taesd").exists():
        make_small_decoder(folder / "taesd")
    if (folder / kind / "model_index.json").exists():
        return
    configs = config_folder(kind)
    index = json.loads((configs / "model_index.json").read_text())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            parts = {name: make_part(configs / name, *v) for name, v in index.items() if isinstance(v, list)}
    finally:
        torch.set_default_dtype(torch.float32)
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    getattr(diffusers, index["_class_name"])(**parts).save_pretrained(folder / kind)


def make_small_decoder(folder: Path) -> None:
    """Near to grey, as the pictures of a random VAE are: it is refused where pixels are too far off."""
    import diffusers

    small = diffusers.AutoencoderTiny()
    last = small.decoder.layers[-1]
    torch.nn.init.normal_(last.weight, std=1e-3)
    torch.nn.init.constant_(last.bias, 0.5)
    small.save_pretrained(folder)


def make_clip(path: Path, device: str) -> None:
    import open_clip
    from safetensors.torch import save_file

    net = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None, device=device)
    save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, path)


def make_part(folder: Path, library: str | None, cls: str) -> Any:
    """One part of a pipeline; tokenizers and schedulers have no weights."""
    import diffusers
    import transformers

    if library is None:
        return None
    if "Tokenizer" in cls or "Scheduler" in cls:
        module = transformers if "Tokenizer" in cls else diffusers
        with torch.device("cpu"):
            return getattr(module, cls).from_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    if library == "diffusers":
        return getattr(diffusers, cls).from_config(config)
    settings = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    return getattr(transformers, cls)(transformers.CLIPTextConfig(**settings))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(kind: str, folder: Path, pixels: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import peft  # noqa: F401

    from sdo_cli.doctor.advice import estimate_recipe
    from sdo_cli.doctor.target import find_target
    from sdo_cli.recipe.load import load_recipe
    from sdo_cli.training.loop import train
    from sdo_cli.training.prepare import prepare

    path = folder / f"{kind}.yaml"
    path.write_text(RECIPE.format(folder=folder, kind=kind, pixels=pixels))
    recipe = load_recipe(str(path), list(overrides))
    estimated = estimate_recipe(recipe, find_target(None)).largest
    imported = resident("VmRSS")
    job, _ = prepare(recipe)
    loaded = resident("VmRSS")
    # loading reads files: only the step's own peak counts
    Path("/proc/self/clear_refs").write_text("5")
    # a few numbers of each: a copy of all would be in the peak
    before = [p.detach().flatten()[:1000].clone() for p in job.parameters]
    start = time.perf_counter()
    result = next(train(job))
    moved = sum(float((a.flatten()[:1000] - b).abs().sum()) for a, b in zip(job.parameters, before, strict=True))
    return {
        "seconds": time.perf_counter() - start,
        "loaded": loaded - imported,
        "peak": resident("VmHWM") - imported,
        # pages of weights are read when they are first used, so what was there before the step does not tell
        "above_weights": resident("VmHWM") - imported - estimated.resident,
        "estimated": estimated.working,
        "grad_norm": result.grad_norm,
        "moved": moved,
        **{f"seconds_{name}": value for name, value in result.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["sd15", "sd21", "sdxl", "sd3-medium"], default="sd15")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only-make", action="store_true", help="write the weights and stop")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.only_make:
        make_weights(given.kind, given.folder)
        return
    print(json.dumps(measure(given.kind, given.folder, given.pixels, given.overrides)))


if __name__ == "__main__":
    main()
