"""What a picture file shows, when it is not 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

# of an interrupted copy, which lays out the whole file first; a disk's block is 512 bytes or more
ZEROS, BLOCK = 256, 512
END_OF_JPEG = b"\xff\xd9"
# run-length encoded BMP
RUN_LENGTHS, END_OF_RUNS = (1, 2), b"\0\1"
# how the files begin that are read
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIN_IS_WHITE, PHOTOMETRIC = 0, 262
# what Pillow raises for a file that is no picture, is cut off, or would be far too large
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def as_shown(image: Image.Image) -> Image.Image:
    """8-bit RGB: turned by EXIF, transparent parts on white.

    Raises:
        ValueError: several frames, values without a known range or profile, or a file whose end was never written.
    """
    _whole(image)
    # a phone's JPEG holds a second view behind the picture
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"it holds {image.n_frames} frames or pages; save the one that is meant")  # type: ignore[attr-defined]
    # a PNG has no more than 16 bits
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    # Pillow turns these round at 8 bits only
    inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == MIN_IS_WHITE  # type: ignore[attr-defined]
    image = ImageOps.exif_transpose(image)
    if sixteen:
        image = _sixteen(image, inverted)
    if image.mode in ("CMYK", "LAB"):
        image = _through_profile(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"its values ({image.mode}) have no known range; save it as 8 or 16 bits")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def _sixteen(image: Image.Image, inverted: bool) -> Image.Image:
    """Grey of 16 bits, rounded; one of its values may stand for nothing."""
    values = np.asarray(image)
    grey = (values.astype(np.float64) / 65535 * 255).round().clip(0, 255).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    clear = image.info.get("transparency")
    return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey))


def _whole(image: Image.Image) -> None:
    """Raises ValueError where a compressed file ends in zeros; in plain BMP and TIFF those may be black."""
    runs = image.format == "BMP" and image.info.get("compression") in RUN_LENGTHS
    if (image.format not in ("JPEG", "MPO", "WEBP") and not runs) or not getattr(image, "filename", ""):
        return
    if (held := _before_zeros(Path(image.filename))) is None:  # type: ignore[attr-defined]
        return
    # some cameras fill the file up behind the picture's end
    ends = (END_OF_RUNS,) if runs else () if image.format == "WEBP" else (END_OF_JPEG,)
    if not held.endswith(ends):
        raise ValueError("it ends in zeros, as a copy does that was interrupted")


def _before_zeros(path: Path) -> bytes | None:
    """What stands before the zeros a file ends in; None where it ends in few or none."""
    with path.open("rb") as stream:
        stream.seek(0, io.SEEK_END)
        stream.seek(max(stream.tell() - ZEROS, 0))
        if any(stream.read()):
            return None
        stream.seek(0)
        return stream.read().rstrip(b"\0")


def perhaps_unfinished(path: Path) -> bool:
    """Whether a plain BMP or TIFF holds nothing from the border of a disk's block on: black, or never written."""
    with path.open("rb") as stream:
        if not stream.read(4).startswith(BEGINNINGS[2:]):
            return False
    held = _before_zeros(path)
    return held is not None and len(held) % BLOCK == 0


def begins_as_picture(path: Path) -> bool:
    """Whether a file begins as the kinds do that are read, whatever it is called."""
    with path.open("rb") as stream:
        start = stream.read(16)
    return start.startswith(BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


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
            if image.mode.startswith("I;16"):
                return bool((np.asarray(image) == image.info["transparency"]).any())
            alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    except UNREADABLE:
        return False
    return bool((alpha < 255).any())
