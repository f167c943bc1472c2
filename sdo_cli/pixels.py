"""What a picture file shows, when it is not 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

# what Pillow raises for a file that is no picture, is cut off, or would be far too large
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def as_shown(image: Image.Image) -> Image.Image:
    """8-bit RGB: turned by EXIF, transparent parts on white.

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
    except UNREADABLE:
        return False
    return bool((alpha < 255).any())
