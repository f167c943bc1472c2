"""Stage ``vae``: the autoencoder of the embedded model, 64×64 RGB to latents ``[4, 16, 16]``."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from embedded import emoji_data as data
from embedded.loop import fit
from torch import Tensor, nn
from torchvision.utils import save_image

BATCH = 24


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=data.IMAGE_SIZE,
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def train_vae(glyphs: Tensor, *, steps: int, work: Path) -> nn.Module:
    """L1, a little L2, L1 of the edges, and a weak KL that keeps the latents smooth and near unit size."""

    def loss_of(vae, generator):
        images, _, _ = data.draw(glyphs, BATCH, generator=generator)
        x = images * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        l1 = (y - x).abs().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = l1 + 0.5 * (y - x).square().mean() + 0.5 * edge + 1e-3 * kl
        return loss, {"l1": l1.item(), "edge": edge.item(), "kl": kl.item()}

    def preview(vae, step):
        images, _, _ = data.draw(glyphs, 32, generator=torch.Generator().manual_seed(1))
        y = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
        print(f"vae {step}: L1 on [-1, 1] with averaged weights {(y - images * 2 + 1).abs().mean():.4f}", flush=True)
        save_image(torch.cat([images[:16], y[:16] / 2 + 0.5, images[16:], y[16:] / 2 + 0.5]), work / "vae.png", nrow=16)

    torch.manual_seed(0)
    return fit("vae", build_vae(), loss_of, steps=steps, peak_rate=1.5e-3, work=work, preview=preview)
