"""A small decoder beside the model's own, for the gradient of the score stage (diffusers' AutoencoderTiny).

Published ones are Ollin Boer Bohan's TAESD, TAESDXL and TAESD3 (MIT); each decodes one family's latents. Held-out
pictures are never drawn by them.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.base import Family
from sdo_cli.models.catalog import tiny_source

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

# published ones: a folder says nothing of whose latents it reads
MADE_FOR = {"madebyollin/taesd": "sd", "madebyollin/taesdxl": "sdxl", "madebyollin/taesd3": "sd3"}
# mean difference of pixels beyond which a decoder is another model's; TAESD's own is a tenth of that
FAR = 0.25
OTHER = "name the one made for the model: taesd (SD 1.x, 2.x), taesdxl, taesd3; or write decoder: full"
# of a piece that is decoded at once where no graph is kept
PIXELS = 512 * 512


class TinyDecoder:
    """Images of latents, by the small decoder alone or in place of the model's own in the backward pass."""

    def __init__(
        self, family: Family, tiny: "AutoencoderTiny", name: str, *, only_jacobian: bool, compare: bool = True
    ) -> None:
        self.family, self.tiny, self.name, self.only_jacobian = family, tiny, name, only_jacobian
        self._looked = not compare

    def __call__(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, RGB in [0, 1], with gradients.

        Raises:
            EnvironmentFault: at the first latents, if it decodes them to something else than the model's own does.
        """
        if not self._looked:
            self._looked = True
            self._compare(latents[:1].detach())
        if not self.only_jacobian:
            return self._decoded(latents).clamp(0, 1)
        side = self.family.vae_factor
        rows = max(1, PIXELS // (latents.shape[-2] * latents.shape[-1] * side * side))
        with torch.no_grad():
            images = torch.cat([self.family.decode(part) for part in latents.split(rows)])
        # saturated pixels have no gradient, as in the model's own decoder
        return _Instead.apply(self._decoded(latents), images)

    def _decoded(self, latents: Tensor) -> Tensor:
        z = latents.to(self.tiny.dtype)
        return self.tiny.decode(z, return_dict=False)[0].float() / 2 + 0.5

    @torch.no_grad()
    def _compare(self, latents: Tensor) -> None:
        gap = (self._decoded(latents).clamp(0, 1) - self.family.decode(latents)).abs().mean().item()
        if gap > FAR:
            raise EnvironmentFault(
                f"tiny_decoder {self.name} does not decode this model's latents: pixels are {gap:.2f} off in the mean",
                remedy=OTHER,
            )


class _Instead(torch.autograd.Function):
    """The values of one image, the gradient of another."""

    @staticmethod
    def forward(ctx: Any, tiny: Tensor, images: Tensor) -> Tensor:
        ctx.save_for_backward((images > 0) & (images < 1))
        del tiny
        return images

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def load_tiny_decoder(name: str, family: Family, *, only_jacobian: bool) -> TinyDecoder:
    """The decoder of this name, folder or hub id, where the model's own is and in its precision.

    Raises:
        EnvironmentFault: no AutoencoderTiny, or one of latents or pictures of another size.
    """
    from diffusers import AutoencoderTiny

    place = tiny_source(name)
    if MADE_FOR.get(place, family.name) != family.name:
        right = next(short for short, kind in MADE_FOR.items() if kind == family.name).rpartition("/")[2]
        raise EnvironmentFault(
            f"tiny_decoder {name} is for {MADE_FOR[place]}, and the model is {family.name}",
            remedy=f"write tiny_decoder: {right}",
        )
    path = Path(place).expanduser()
    if path.is_dir() or path.exists():
        check_folder(name, path)
    config_log = logging.getLogger("diffusers.configuration_utils")
    level = config_log.level
    # it says of what its own save_pretrained writes that it is not expected
    config_log.setLevel(logging.ERROR)
    try:
        tiny = AutoencoderTiny.from_pretrained(str(path) if path.is_dir() else place, torch_dtype=family.vae.dtype)
    finally:
        config_log.setLevel(level)
    channels, factor = tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    own = family.vae.config.latent_channels
    if (channels, factor) != (own, family.vae_factor):
        raise EnvironmentFault(
            f"tiny_decoder {name} reads {channels} channels of a {factor}th of the size, "
            f"this model's latents have {own} of a {family.vae_factor}th",
            remedy=OTHER,
        )
    return TinyDecoder(family, tiny.requires_grad_(False).eval().to(family.device), name, only_jacobian=only_jacobian)


def check_folder(name: str, path: Path) -> None:
    """Raises EnvironmentFault for what is no folder of an AutoencoderTiny."""
    file = path / "config.json"
    kind = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
    if kind != "AutoencoderTiny":
        what = "a file" if path.is_file() else f"an {kind}" if kind else "no model"
        raise EnvironmentFault(
            f"tiny_decoder {name} is {what}, not the folder of an AutoencoderTiny",
            remedy="name taesd, taesdxl or taesd3, the folder of one, or a hub id",
        )
