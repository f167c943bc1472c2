"""Images to files."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import write_atomic
from sdo_cli.pixels import UNREADABLE, as_shown


def to_pil(image: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] to 8-bit, rounded as diffusers rounds."""
    array = (image.detach().cpu().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array)


def save_image(image: Tensor, path: Path, note: PngInfo | None = None) -> None:
    """Write a PNG, with ``note`` inside it."""
    write_atomic(path, lambda temporary: to_pil(image).save(temporary, pnginfo=note))


def read_image(path: Path) -> Tensor:
    """``[3, H, W]`` in [0, 1], as 8-bit RGB, as a viewer shows it: turned by EXIF, transparent parts on white.

    Raises:
        EnvironmentFault: no readable picture, or one whose colours cannot be known.
    """
    try:
        with Image.open(path) as image:
            array = np.array(as_shown(image))
    except UNREADABLE as fault:
        raise EnvironmentFault(
            f"{path} is no readable image: {fault}", remedy="remove it; if sdo drew it, it is drawn again"
        ) from fault
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def save_grid(
    rows: list[Tensor], labels: list[str], path: Path, *, captions: list[str] | None = None, shown_side: int = 128
) -> None:
    """Rows of images ``[n, 3, H, W]`` under each other, each row with its label; small images are enlarged.

    Args:
        captions: one per column, written above it.
    """
    side = max(shown_side, rows[0].shape[-1])
    margin, columns = 4, len(rows[0])
    left = 8 + max(7 * len(label) for label in labels)
    heads = ["\n".join(textwrap.wrap(caption, side // 6)) for caption in captions or []]
    head = 14 * max((1 + text.count("\n") for text in heads), default=0)
    size = (left + columns * (side + margin), head + len(rows) * (side + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for c, text in enumerate(heads):
        pen.multiline_text((left + c * (side + margin), 2), text, fill="black", spacing=2)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + margin + r * (side + margin)
        pen.text((4, top + side // 2 - 6), label, fill="black")
        for c, image in enumerate(row):
            tile = to_pil(image).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + c * (side + margin), top))
    write_atomic(path, sheet.save)
