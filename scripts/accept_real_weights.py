"""Acceptance on real weights: what a person with a GPU and the hub runs once.

    python scripts/accept_real_weights.py --out accept                 everything (tens of GB, hours on one GPU)
    python scripts/accept_real_weights.py --out accept --only rewards  one part: families, rewards, benchmark, training

Each line is one claim with its figure and a verdict, the last one counts them; `skip` says what is missing.
HPS and ImageReward are held against their authors' packages where these can be imported (they pin old versions: see
scripts/reference_rewards.py for an environment that lends them this one's torch).

--settings file.json replaces models, options and prompts by others; the tests run it so on small random weights.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from sdo_cli.device import dtype_of, pick_device  # noqa: E402
from sdo_cli.drawing.draw import DrawSettings, draw_images  # noqa: E402
from sdo_cli.drawing.pictures import to_pil  # noqa: E402
from sdo_cli.files import write_json  # noqa: E402
from sdo_cli.models.load import load_family  # noqa: E402
from sdo_cli.scoring.rewards import build_reward, score_images  # noqa: E402

PROMPTS = ["a lighthouse in thick fog", "a red vintage car, watercolor", "two otters reading a newspaper", "a fox"]
REAL: dict[str, Any] = {
    # model -> (the scheduler its folder names, under sdo's name; guidance)
    "families": {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": ["pndm", 7.5],
        "stabilityai/stable-diffusion-2-1-base": ["pndm", 7.5],
        "stabilityai/stable-diffusion-2-1": ["ddim", 7.5],
        "stabilityai/stable-diffusion-xl-base-1.0": ["euler", 5.0],
        "stabilityai/stable-diffusion-3.5-medium": ["flow-euler", 4.5],
    },
    "steps": 30,
    "rewards": {
        name: {}
        for name in (
            "clip-score",
            "aesthetic-v2",
            "hps-v2",
            "hps-v2.1",
            "pickscore-v1",
            "imagereward-v1",
            "cyclereward-combo",
        )
    },
    "openai_clip": "openai/clip-vit-large-patch14",
    "picture_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "benchmark_reward": {"name": "hps-v2", "options": {}},
    # the authors' prompts: dataset zhwang/HPDv2, folder benchmark; 800 of each style, these many are drawn
    "benchmark_prompts": None,
    "benchmark_count": 50,
    "training": {"aesthetic": ["max_train_steps=100"], "hps": ["max_train_steps=100"]},
}
STYLES = ("anime", "concept-art", "paintings", "photo")
# tgxs002/HPSv2, README, table of HPS v2: Stable Diffusion v1.4 (1.5 is not in it), average of the four styles
PUBLISHED_HPS = 26.95


@dataclass(frozen=True)
class Verdict:
    """``passed`` is None for what could not be tried."""

    claim: str
    figure: str
    passed: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "skip"}[self.passed]
        return f"{word}  {self.claim:<58} {self.figure}"


def failed(claim: str, fault: Exception) -> Verdict:
    """What could not even be tried, a gated model or a full GPU, must not take the other lines with it."""
    text = (str(fault).strip().splitlines() or [""])[0]
    return Verdict(claim, f"{type(fault).__name__}: {text}"[:300], False)


def families(settings: dict[str, Any]) -> Iterator[Verdict]:
    """Images of every family against plain diffusers', same noise, in fp32."""
    for model, (solver, guidance) in settings["families"].items():
        claim = f"{model}: image is plain diffusers'"
        try:
            worst = _difference_to_diffusers(model, solver, guidance, settings["steps"])
        except Exception as fault:
            yield failed(claim, fault)
            continue
        yield Verdict(claim, f"largest difference {worst}/255", worst <= 2)


def _difference_to_diffusers(model: str, solver: str, guidance: float, steps: int) -> int:
    import diffusers

    device = pick_device()
    family = load_family(model)
    family.to(device, torch.float32)
    drawn = DrawSettings(solver, num_inference_steps=steps, guidance_scale=guidance)
    ours = next(draw_images(family, PROMPTS[:1], lambda j: torch.Generator().manual_seed(3), drawn))[0]
    del family
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(device)
    generator = torch.Generator().manual_seed(3)
    image = pipe(PROMPTS[0], num_inference_steps=steps, guidance_scale=guidance, generator=generator).images[0]
    return int(np.abs(np.asarray(to_pil(ours), dtype=int) - np.asarray(image, dtype=int)).max())


def pictures(settings: dict[str, Any], prompts: list[str]) -> torch.Tensor:
    """One image per prompt ``[B, 3, H, W]``, rounded to bytes as a saved file is."""
    family = load_family(settings["picture_model"])
    family.to(pick_device(), torch.float32)
    drawn = DrawSettings(num_inference_steps=settings["steps"], guidance_scale=7.5)
    parts = draw_images(family, prompts, lambda j: torch.Generator().manual_seed(j), drawn, batch_size=4)
    return (torch.cat(list(parts)) * 255).round() / 255


def reward_parity(settings: dict[str, Any]) -> Iterator[Verdict]:
    """Scores against the reference packages, on the same pictures."""
    images = pictures(settings, PROMPTS)
    for name, options in settings["rewards"].items():
        claim = f"{name}: score of the reference implementation"
        try:
            reward = build_reward(name, options, pick_device())
            ours = score_images(reward, images.to(pick_device()), PROMPTS)
            theirs = REFERENCES[name](settings, reward, [to_pil(image) for image in images])
        except ImportError as fault:
            yield Verdict(claim, f"{fault}: install the authors' package", None)
            continue
        except Exception as fault:
            yield failed(claim, fault)
            continue
        worst = ((ours - theirs).abs().max() / theirs.std()).item()
        yield Verdict(claim, f"worst {worst:.1e} of the spread; scores {_few(ours)}", worst < 1e-2)


def _few(scores: torch.Tensor) -> str:
    return " ".join(f"{score:.3f}" for score in scores.tolist())


def _transformers_clip(settings: dict[str, Any], images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import CLIPModel

    net = CLIPModel.from_pretrained(settings["openai_clip"]).eval()
    with torch.no_grad():
        out = net(**_processed(settings["openai_clip"], images))
    return out.image_embeds, out.text_embeds


def _processed(repo: str, images: list[Any]) -> dict[str, Any]:
    """Pixels and ids as the published processors made them in their authors' day: resized by PIL."""
    import transformers

    # newer versions resize with torchvision unless told otherwise, a level off here and there
    by_pil = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    words = transformers.CLIPTokenizer.from_pretrained(repo)
    pixels = by_pil.from_pretrained(repo)(images, return_tensors="pt").pixel_values
    return {"pixel_values": pixels, **words(PROMPTS, padding=True, truncation=True, return_tensors="pt")}


def reference_clip(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    seen, read = _transformers_clip(settings, images)
    return (seen * read).sum(-1)


def reference_aesthetic(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    seen, _ = _transformers_clip(settings, images)
    with torch.no_grad():
        return reward.head.cpu()(seen).squeeze(-1)


def reference_pickscore(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    """As the authors' model card does it."""
    from transformers import AutoModel

    options = settings["rewards"]["pickscore-v1"]
    processor = settings.get("pick_processor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    net = AutoModel.from_pretrained(options.get("model") or "yuvalkirstain/PickScore_v1").eval()
    with torch.no_grad():
        out = net(**_processed(processor, images))
    return net.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(-1)


def reference_hps(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    import hpsv2

    version = {"hps-v2": "v2.0", "hps-v2.1": "v2.1"}[reward.info.name]
    return torch.tensor([
        float(hpsv2.score(image, prompt, hps_version=version)[0]) for image, prompt in zip(images, PROMPTS, strict=True)
    ])  # fmt: skip


def reference_imagereward(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    import ImageReward

    net = ImageReward.load("ImageReward-v1.0")
    return torch.tensor([net.score(prompt, image) for image, prompt in zip(images, PROMPTS, strict=True)])


def reference_cyclereward(settings: dict[str, Any], reward: Any, images: list[Any]) -> torch.Tensor:
    from cyclereward import cyclereward

    net, transform = cyclereward(device="cpu", model_type="CycleReward-Combo")
    return torch.tensor([
        net.score(transform(image)[None], prompt).item() for image, prompt in zip(images, PROMPTS, strict=True)
    ])  # fmt: skip


REFERENCES = {
    "clip-score": reference_clip,
    "aesthetic-v2": reference_aesthetic,
    "pickscore-v1": reference_pickscore,
    "hps-v2": reference_hps,
    "hps-v2.1": reference_hps,
    "imagereward-v1": reference_imagereward,
    "cyclereward-combo": reference_cyclereward,
}


def benchmark(settings: dict[str, Any]) -> Iterator[Verdict]:
    """The HPS v2 benchmark's figure for SD 1.x on part of its prompts."""
    prompts = settings["benchmark_prompts"] or _benchmark_prompts()
    spec, means, errors = settings["benchmark_reward"], [], []
    for style, lines in prompts.items():
        few = lines[: settings["benchmark_count"]]
        reward = build_reward(spec["name"], spec["options"], pick_device())
        scores = 100 * score_images(reward, pictures(settings, few).to(pick_device()), few, batch_size=8)
        means.append(scores.mean().item())
        errors.append((scores.std() / len(scores) ** 0.5).item())
        yield Verdict(f"HPS v2 benchmark, {style}", f"{means[-1]:.2f} ± {errors[-1]:.2f} ({len(few)} prompts)", None)
    mean, error = np.mean(means), np.linalg.norm(errors) / len(errors)
    text = f"{mean:.2f} ± {error:.2f}, published for SD v1.4: {PUBLISHED_HPS}"
    yield Verdict("HPS v2 benchmark, average", text, bool(abs(mean - PUBLISHED_HPS) < max(0.3, 3 * error)))


def _benchmark_prompts() -> dict[str, list[str]]:
    from huggingface_hub import hf_hub_download

    files = {s: hf_hub_download("zhwang/HPDv2", f"benchmark/{s}.json", repo_type="dataset") for s in STYLES}
    return {style: json.loads(Path(path).read_text()) for style, path in files.items()}


def training(settings: dict[str, Any], out: Path) -> Iterator[Verdict]:
    """A run of each recipe: the trained reward must rise on held-out prompts."""
    for name, overrides in settings["training"].items():
        folder = out / f"run-{name}"
        words = [sys.executable, "-m", "sdo_cli", "finetune", "--recipe", name, "--out", str(folder), "--json"]
        done = subprocess.run([*words, *overrides], capture_output=True, text=True, cwd=ROOT)
        claim = f"recipe {name}: held-out gain of the trained reward"
        if done.returncode != 0:
            yield Verdict(claim, " ".join(done.stderr.strip().splitlines()[-3:])[:300], False)
            continue
        trained = next(iter(json.loads(done.stdout)["gains"].items()))
        gain, error = trained[1]["difference"], trained[1]["standard_error"] or float("inf")
        yield Verdict(claim, f"{gain:+.4f} ± {error:.4f} ({trained[0]}); look at {folder}/samples", gain > 3 * error)


def _whatever_happens(name: str, verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    try:
        yield from verdicts
    except Exception as fault:
        yield failed(f"{name}: the rest of this part", fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["families", "rewards", "benchmark", "training"])
    parser.add_argument("--settings", type=Path)
    given = parser.parse_args()
    settings = REAL | (json.loads(given.settings.read_text()) if given.settings else {})
    parts = {
        "families": lambda: families(settings),
        "rewards": lambda: reward_parity(settings),
        "benchmark": lambda: benchmark(settings),
        "training": lambda: training(settings, given.out),
    }
    found: list[Verdict] = []
    for name, part in parts.items():
        if given.only in (None, name):
            for verdict in _whatever_happens(name, part()):
                print(verdict, flush=True)
                found.append(verdict)
    given.out.mkdir(parents=True, exist_ok=True)
    device = {"device": str(pick_device()), "dtype": str(dtype_of("no")), "rewards": sorted(rewards.TABLE)}
    write_json(given.out / "verdicts.json", {"verdicts": [asdict(verdict) for verdict in found], **device})
    wrong = sum(verdict.passed is False for verdict in found)
    passed = sum(verdict.passed is True for verdict in found)
    print(f"{passed} passed, {wrong} failed, {len(found) - passed - wrong} not tried; {given.out}/verdicts.json")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
