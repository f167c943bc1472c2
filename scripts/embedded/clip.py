"""Stages ``clip``, ``judge`` and ``aesthetic``: small open_clip models and a predictor head on the same pictures."""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from embedded import emoji_data as data
from embedded.loop import fit
from embedded.unet import MAX_TOKENS, tokenize
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from transformers import CLIPTokenizer

from rewards.aesthetic import predictor_head
from rewards.colorfulness import colorfulness

BATCH = 128
TEXT = {"context_length": MAX_TOKENS, "width": 64, "heads": 4, "layers": 2, "hf_tokenizer_name": "."}
MODELS = {
    # what recipes train on
    "clip": {"embed_dim": 64, "vision_cfg": {"layers": 4, "width": 128, "head_width": 32, "patch_size": 8}},
    # what only measures: another architecture, another seed
    "judge": {"embed_dim": 64, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 12}},
}
SEEDS = {"clip": 11, "judge": 29}
PREPROCESS = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}


def model_config(name: str, vocab_size: int) -> dict:
    config = json.loads(json.dumps(MODELS[name]))
    config["vision_cfg"]["image_size"] = data.IMAGE_SIZE
    return config | {"text_cfg": TEXT | {"vocab_size": vocab_size}}


@torch.no_grad()
def blurred_pool(vae: AutoencoderKL, glyphs: Tensor, *, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures as a diffusion model gets them wrong: through the VAE with noise on the latents."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for _ in range(count // 64):
        images, objects, colours = data.draw(glyphs, 64, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(images * 2 - 1).latent_dist.mean.float()
            level = 0.5 * torch.rand(64, 1, 1, 1, generator=generator)
            z = z + level * z.std() * torch.randn(z.shape, generator=generator)
            y = vae.decode(z).sample.float()
        parts.append(((y / 2 + 0.5).clamp(0, 1).half(), objects, colours))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A third noisy, a third blurred, a third as they are."""
    third = len(images) // 3
    level = 0.15 * torch.rand(third, 1, 1, 1, generator=generator)
    noisy = images[:third] + level * torch.randn(images[:third].shape, generator=generator)
    sigma = 0.4 + torch.rand(1, generator=generator).item()
    soft = gaussian_blur(images[third : 2 * third], 5, sigma)
    return torch.cat([noisy, soft, images[2 * third :]]).clamp(0, 1)


def train_clip(
    name: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer, glyphs: Tensor, *, steps: int, work: Path
) -> nn.Module:
    """Symmetric contrastive loss; pictures of the same caption in one batch do not count against each other."""
    pool, pool_objects, pool_colours = blurred_pool(vae, glyphs, count=3072, seed=SEEDS[name])
    lines = [data.caption(noun, colour) for noun in data.OBJECTS for colour in data.COLOUR_NAMES]
    tokens = tokenize(tokenizer, lines)

    def batch(generator):
        images, objects, colours = data.draw(glyphs, BATCH // 2, generator=generator)
        pick = torch.randint(len(pool), (BATCH // 2,), generator=generator)
        images = torch.cat([augment(images, generator), pool[pick].float()])
        line = torch.cat([objects, pool_objects[pick]]) * len(data.COLOUR_NAMES) + torch.cat(
            [colours, pool_colours[pick]]
        )
        return images * 2 - 1, line

    def loss_of(model, generator):
        x, line = batch(generator)
        image, text, scale = model(x, tokens[line])
        logits = scale * image @ text.T
        same = (line[:, None] == line[None]) & ~torch.eye(BATCH, dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(BATCH)
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        right = (logits.argmax(1) == target).float().mean().item()
        return loss, {"loss": loss.item(), "accuracy": right}

    torch.manual_seed(SEEDS[name])
    model = open_clip.CLIP(**model_config(name, len(tokenizer)))
    return fit(name, model, loss_of, steps=steps, peak_rate=1e-3, work=work, weight_decay=0.05)


def train_aesthetic(clip: nn.Module, vae: AutoencoderKL, glyphs: Tensor, *, steps: int, work: Path) -> nn.Module:
    """LAION's predictor layout, fitted to Hasler-Süsstrunk colourfulness (published, needs no human labels)."""
    pool, _, _ = blurred_pool(vae, glyphs, count=3072, seed=53)

    def loss_of(head, generator):
        pick = torch.randint(len(pool), (BATCH,), generator=generator)
        images, _, _ = data.draw(glyphs, BATCH, generator=generator)
        images = torch.cat([augment(images, generator), pool[pick].float()])
        with torch.no_grad():
            embedding = F.normalize(clip.encode_image(images * 2 - 1), dim=-1)
            target = 10 * colorfulness(images)
        error = head(embedding).squeeze(-1) - target
        return error.square().mean(), {"mse": error.square().mean().item(), "spread": target.var().item()}

    torch.manual_seed(53)
    return fit("aesthetic", predictor_head(64), loss_of, steps=steps, peak_rate=1e-3, work=work)


def write_clip(name: str, model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The layout that ``open_clip.create_model("local-dir:…")`` reads; weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_config(name, len(tokenizer)), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    # batch-norm counters are integers; everything else is stored in half precision
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
