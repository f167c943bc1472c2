"""Images to files."""

import io
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdo_cli.errors import EnvironmentFault
from sdo_cli.files import write_atomic


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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise EnvironmentFault(
            f"{path} is no readable image: {fault}", remedy="remove it; if sdo drew it, it is drawn again"
        ) from fault
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def as_shown(image: Image.Image) -> Image.Image:
    """8-bit RGB.

    Raises:
        ValueError: several frames, or values without a known range or profile.
    """
    # a phone's JPEG holds a second view behind the picture
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"it holds {image.n_frames} frames or pages; save the one that is meant")  # type: ignore[attr-defined]
    # a PNG has no more than 16 bits
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if sixteen:
        image = Image.fromarray((np.asarray(image, np.float64) / 65535 * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("CMYK", "LAB"):
        image = _through_profile(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"its values ({image.mode}) have no known range; save it as 8 or 16 bits")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def _through_profile(image: Image.Image) -> Image.Image:
    """Inks to sRGB by the printer's profile inside; without one there are as many pictures as printers."""
    profile = image.info.get("icc_profile")
    if not profile:
        raise ValueError(f"its colours are {image.mode} without a profile; save it as RGB")
    try:
        shown = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except ImageCms.PyCMSError as fault:
        raise ValueError(f"its colour profile cannot be used: {fault}") from fault
    assert shown is not None
    return shown


def transparent(path: Path) -> bool:
    """Whether a picture has parts that are not opaque; False for what is no picture, which is said when it is read."""
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return False
            alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return bool((alpha < 255).any())


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
