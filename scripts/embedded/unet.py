"""Stages ``tokenizer`` and ``unet``: the vocabulary, the text encoder and the denoiser of the embedded model."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from embedded import emoji_data as data
from embedded.loop import fit
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BATCH = 64
MAX_TOKENS = 20
WIDTH = 128
POOL = 127 * 12 * 12
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's form, merged until every word of the captions is one token."""
    words = sorted({word for noun in data.OBJECTS for word in f"{noun} {data.article(noun)}".replace("-", " ").split()})
    words += [*data.COLOUR_NAMES, "on", "background", "an"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=0, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, then the two marks (open_clip pools at the highest id).
    entries = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    entries = list(dict.fromkeys(entries))
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}, indent=2)
    )
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    settings |= {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids ``[B, MAX_TOKENS]``."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


class TextToImage(nn.Module):
    """What is trained together: text encoder and denoiser."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=data.IMAGE_SIZE // 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 136),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, glyphs: Tensor, work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """``POOL`` scaled latents with their object and colour indices, kept in ``work/pool.pt``."""
    path = work / "pool.pt"
    if not path.exists():
        generator, parts = torch.Generator().manual_seed(77), []
        for start in range(0, POOL, 96):
            images, objects, colours = data.draw(glyphs, 96, generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(images * 2 - 1).latent_dist.mean
            parts.append((latents.half(), objects, colours))
            if start % 1920 == 0:
                print(f"pool {start}/{POOL}", flush=True)
        torch.save([torch.cat(column) for column in zip(*parts, strict=True)], path)
    return tuple(torch.load(path, weights_only=True))


@torch.no_grad()
def sample(model: TextToImage, vae: AutoencoderKL, tokens: Tensor, empty: Tensor, *, guidance: float) -> Tensor:
    """DDIM-20 images in [0, 1]."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(20)
    x = torch.randn(len(tokens), 4, 16, 16, generator=torch.Generator().manual_seed(5))
    states = model.text(torch.cat([empty.expand_as(tokens), tokens])).last_hidden_state
    for t in scheduler.timesteps:
        free, cond = model.unet(torch.cat([x, x]), t, states).sample.chunk(2)
        x = scheduler.step(free + guidance * (cond - free), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def train_unet(vae: AutoencoderKL, tokenizer: CLIPTokenizer, glyphs: Tensor, *, steps: int, work: Path) -> TextToImage:
    """ε-prediction with min-SNR weights (γ = 5); captions dropped for 10 %, their colour for 6 %."""
    latents, objects, colours = latent_pool(vae, glyphs, work)
    scale = 1 / latents.float().std().item()
    vae.register_to_config(scaling_factor=scale)
    n_colours = len(data.COLOUR_NAMES)
    lines = [data.caption(noun, colour) for noun in data.OBJECTS for colour in data.COLOUR_NAMES]
    lines += [data.caption(noun, None) for noun in data.OBJECTS] + [""]
    tokens = tokenize(tokenizer, lines)
    bare, empty = len(data.OBJECTS) * n_colours, len(lines) - 1
    noise_levels = make_scheduler().alphas_cumprod

    def loss_of(model, generator):
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        x0 = latents[pick].float() * scale
        line = objects[pick] * n_colours + colours[pick]
        fate = torch.rand(BATCH, generator=generator)
        line = torch.where(fate < 0.16, bare + objects[pick], line)
        line = torch.where(fate < 0.10, torch.full_like(line, empty), line)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = noise_levels[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            states = model.text(tokens[line]).last_hidden_state
            e = model.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, states).sample
        error = (e.float() - noise).square().mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        return (error * snr.clamp(max=5) / snr).mean(), {"mse": error.mean().item()}

    shown = [(7 * k % len(data.OBJECTS)) * n_colours + (5 * k % n_colours) for k in range(32)]

    def preview(model, step):
        if step % 500 == 0:
            rows = [sample(model, vae, tokens[shown], tokens[empty:], guidance=g) for g in (1.0, 4.0)]
            save_image(torch.cat(rows), work / f"unet_{step:05d}.png", nrow=16)

    torch.manual_seed(0)
    model = TextToImage(tokenizer)
    ready = fit("unet", model, loss_of, steps=steps, peak_rate=1.5e-3, work=work, preview=preview)
    assert isinstance(ready, TextToImage)
    return ready
