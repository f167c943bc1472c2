"""Images and captions for the embedded models: colour emoji on plain backgrounds.

Glyphs come from Debian's ``fonts-noto-color-emoji`` (SIL Open Font License 1.1); captions from
``unicodedata.name``. Nothing is downloaded and nothing is stored: every batch is drawn on the spot.
"""

import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
IMAGE_SIZE = 64
FONT_SIZE = 109  # the only bitmap size the font holds

ANIMALS = (
    "1F404 1F405 1F406 1F407 1F408 1F409 1F40A 1F40B 1F40C 1F40D 1F40E 1F40F 1F411 1F412 1F413 1F415 1F416 "
    "1F418 1F419 1F41A 1F41B 1F41C 1F41D 1F41E 1F41F 1F420 1F422 1F424 1F426 1F427 1F428 1F429 1F42C 1F438 "
    "1F439 1F43A 1F43B 1F43C 1F980 1F981 1F982 1F984 1F985 1F986 1F988 1F989 1F98A 1F98B 1F98C 1F98D 1F98E "
    "1F991 1F992 1F993 1F994 1F995 1F998 1F999 1F99A 1F99C 1F99E 1F9A2 1F9A3 1F9A5 1F9A9"
)
PLANTS = "1F331 1F332 1F333 1F334 1F335 1F337 1F338 1F339 1F33A 1F33B 1F340 1F341 1F344"
FOOD = (
    "1F345 1F346 1F347 1F348 1F349 1F34A 1F34B 1F34C 1F34D 1F34E 1F34F 1F350 1F351 1F352 1F353 1F354 1F355 "
    "1F35E 1F35F 1F366 1F369 1F36A 1F36D 1F382 1F950 1F951 1F955 1F965 1F966 1F968 1F95D 1F37F"
)
VEHICLES = "1F680 1F681 1F682 1F68C 1F691 1F692 1F693 1F695 1F697 1F69A 1F69C 1F6A2 1F6A4"
THINGS = "1F381 1F383 1F384 1F388"

CATEGORIES = {"animal": ANIMALS, "plant": PLANTS, "food": FOOD, "vehicle": VEHICLES, "thing": THINGS}
CODEPOINTS = [int(code, 16) for codes in CATEGORIES.values() for code in codes.split()]
OBJECTS = [unicodedata.name(chr(code)).lower() for code in CODEPOINTS]

COLOURS = {
    "red": (214, 48, 49),
    "orange": (247, 140, 40),
    "yellow": (250, 214, 60),
    "green": (60, 160, 70),
    "teal": (30, 150, 150),
    "blue": (50, 100, 215),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
    "gray": (140, 140, 140),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLOUR_NAMES = list(COLOURS)


def article(noun: str) -> str:
    """``a`` or ``an``."""
    return "an" if noun[0] in "aeio" else "a"


def caption(noun: str, colour: str | None) -> str:
    """``a tiger on a teal background``; without a colour, ``a tiger``."""
    subject = f"{article(noun)} {noun}"
    return subject if colour is None else f"{subject} on {article(colour)} {colour} background"


def render_glyphs(size: int = IMAGE_SIZE, font_path: Path = FONT) -> Tensor:
    """Every glyph with premultiplied alpha, float in [0, 1], ``[len(CODEPOINTS), 4, size, size]``."""
    from PIL import Image, ImageDraw, ImageFont

    if not font_path.exists():
        raise FileNotFoundError(f"{font_path} is missing; install it with: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    glyphs = []
    for code in CODEPOINTS:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), chr(code), font=font, embedded_color=True)
        box = canvas.getbbox()
        side = max(box[2] - box[0], box[3] - box[1])
        left, top = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
        square = canvas.crop((left, top, left + side, top + side))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        rgba = pixels.view(side, side, 4).permute(2, 0, 1).float() / 255
        rgba[:3] *= rgba[3:]
        glyphs.append(F.interpolate(rgba[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1))
    return torch.stack(glyphs)


def colour_table() -> Tensor:
    """Background colours in [0, 1], ``[12, 3]``, in the order of ``COLOUR_NAMES``."""
    return torch.tensor([COLOURS[name] for name in COLOUR_NAMES]) / 255


def compose(glyphs: Tensor, objects: Tensor, colours: Tensor, *, generator: torch.Generator) -> Tensor:
    """Place one glyph per image at random scale (0.68 to 0.98) and position on its background.

    Args:
        glyphs: ``[G, 4, S, S]`` from :func:`render_glyphs`.
        objects, colours: indices ``[B]``.

    Returns:
        images ``[B, 3, S, S]`` in [0, 1].
    """
    count, size = objects.shape[0], glyphs.shape[-1]
    scale = 0.68 + 0.30 * torch.rand(count, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    placed = F.grid_sample(glyphs[objects], grid, align_corners=False)
    wobble = 0.02 * torch.randn(count, 3, generator=generator)
    background = (colour_table()[colours] + wobble).clamp(0, 1)
    return (placed[:, :3] + (1 - placed[:, 3:]) * background[:, :, None, None]).clamp(0, 1)


def draw(glyphs: Tensor, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random batch: images ``[count, 3, S, S]``, object indices ``[count]``, colour indices ``[count]``."""
    objects = torch.randint(len(OBJECTS), (count,), generator=generator)
    colours = torch.randint(len(COLOUR_NAMES), (count,), generator=generator)
    return compose(glyphs, objects, colours, generator=generator), objects, colours
