"""Stage ``tiny``: a small decoder for the packed pipeline's latents, an AutoencoderTiny as TAESD is.

It learns from the pipeline's own VAE: latents the pipeline draws, with some noise, and the VAE's pictures of them.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from embedded.loop import fit
from embedded.pack import WEIGHTS
from embedded.student import guided, text_states
from torch import Tensor, nn
from torchvision.utils import save_image

BATCH = 16
CHANNELS = (24, 24, 24)
# of the latents' own spread, how much noise is added at most: what training's latents come to is none the VAE made
NOISE = 0.25
POOL, CALLS, COPIES = 512, 8, 3


def build() -> AutoencoderTiny:
    """The encoder serves nothing here and is as small as can be."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=CHANNELS,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    )


@torch.no_grad()
def drawn_latents(pipe: StableDiffusionPipeline, work: Path) -> Tensor:
    """Of every third caption, without guidance and with, ``[POOL, 4, 16, 16]``; kept in ``work/tiny-pool.pt``."""
    path = work / "tiny-pool.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    states, parts = text_states(pipe), []
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(CALLS)
    lines = torch.arange(0, len(states) - 1, (len(states) - 1) // POOL)[:POOL]
    for number, part in enumerate(lines.split(64)):
        x = torch.randn(len(part), 4, 16, 16, generator=torch.Generator().manual_seed(9000 + number))
        for t in scheduler.timesteps:
            times, caption = t.expand(len(x)), states[part]
            if number % 2:
                noise = guided(pipe.unet, x, times, caption, states[-1:])
            else:
                noise = pipe.unet(x, times, caption).sample
            x = scheduler.step(noise, t, x).prev_sample
        parts.append(x)
        print(f"latents {number + 1}/{len(lines.split(64))}", flush=True)
    torch.save(torch.cat(parts), path)
    return torch.cat(parts)


def train_tiny(*, steps: int, work: Path) -> None:
    """Pixels and their differences to the neighbour; writes ``weights/tiny``."""
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "emoji", dtype=torch.float32)
    vae = pipe.vae.requires_grad_(False).eval()
    latents = drawn_latents(pipe, work)
    tiny = build()
    tiny.encoder.requires_grad_(False)
    decoder = nn.ModuleList([tiny.decoder])

    @torch.no_grad()
    def pictures(z: Tensor) -> Tensor:
        return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in z.split(16)])

    noise = torch.Generator().manual_seed(9999)
    size = NOISE * latents.std() * torch.rand(COPIES * len(latents), 1, 1, 1, generator=noise)
    shown = latents.repeat(COPIES, 1, 1, 1)
    shown = shown + size * torch.randn(shown.shape, generator=noise)
    targets = pictures(shown)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def loss_of(_: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(len(shown), (BATCH,), generator=generator)
        target, made = targets[pick], tiny.decode(shown[pick]).sample
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(target), strict=True))
        loss = (made - target).square().mean() + 0.5 * (made - target).abs().mean() + sharp
        return loss, {"loss": loss.item(), "L1": (made - target).abs().mean().item() / 2}

    @torch.no_grad()
    def preview(_: nn.Module, step: int) -> None:
        z = latents[::16][:32]
        rows = [(images / 2 + 0.5).clamp(0, 1) for images in (pictures(z), tiny.decode(z).sample)]
        print(f"tiny {step}: L1 from the VAE's pictures {(rows[1] - rows[0]).abs().mean():.4f}", flush=True)
        picture = [part for parts in zip(*(row.split(16) for row in rows), strict=True) for part in parts]
        save_image(torch.cat(picture), work / f"tiny_{step:05d}.png", nrow=16)

    fit("tiny", decoder, loss_of, steps=steps, peak_rate=3e-3, work=work, preview=preview)
    tiny.half().save_pretrained(WEIGHTS / "tiny", safe_serialization=True)
    # diffusers writes a key that it then says it does not expect
    config = WEIGHTS / "tiny" / "config.json"
    tree = {name: value for name, value in json.loads(config.read_text()).items() if name != "block_out_channels"}
    config.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
