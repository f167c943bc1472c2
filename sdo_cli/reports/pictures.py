"""Thumbnails small enough that a page of thousands can be sent."""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from sdo_cli.files import write_atomic
from sdo_cli.pixels import UNREADABLE, as_shown

# sides in pixels and WebP qualities, from the best to the smallest
SIZES = ((384, 82), (320, 80), (256, 78), (208, 74), (160, 70), (128, 65), (96, 60), (64, 50))
# base64 writes 3 bytes as 4
EXPANSION = 4 / 3
PIXEL_ART = 128
# of the files beside a page: digits of their SHA-256
NAME_LENGTH = 20


class Thumbnails:
    """Pictures by path, each once however often it is shown.

    Attributes:
        side, quality: of all thumbnails.
    """

    def __init__(self, paths: Iterable[Path], budget: float) -> None:
        self.paths = list(dict.fromkeys(paths))
        self.side, self.quality = self._choose(budget)
        self._made: dict[Path, bytes | None] = {}

    def _choose(self, budget: float) -> tuple[int, int]:
        """The largest that fits: some pictures are tried, and all are counted by them."""
        stride = max(1, len(self.paths) // 24)
        some = self.paths[::stride]
        for side, quality in SIZES:
            sizes = [len(made) for path in some if (made := thumbnail(path, side, quality)) is not None]
            mean = sum(sizes) / len(sizes) if sizes else 0
            # pictures differ: a tenth is kept free
            if mean * len(self.paths) * EXPANSION * 1.1 <= budget:
                return side, quality
        return SIZES[-1]

    def made(self) -> Iterator[tuple[Path, bytes | None]]:
        for path in self.paths:
            if path not in self._made:
                self._made[path] = thumbnail(path, self.side, self.quality)
            yield path, self._made[path]

    def inline(self) -> tuple[list[str], dict[Path, int]]:
        """``data:`` addresses, and which of them is which path's; equal pictures share one."""
        addresses: list[str] = []
        seen: dict[bytes, int] = {}
        place = {}
        for path, content in self.made():
            if content is None:
                continue
            if content not in seen:
                seen[content] = len(addresses)
                addresses.append("data:image/webp;base64," + base64.b64encode(content).decode())
            place[path] = seen[content]
        return addresses, place

    def beside(self, folder: Path) -> tuple[list[str], dict[Path, int]]:
        """The same as files in ``folder``, addressed from the page beside it."""
        addresses: list[str] = []
        seen: dict[str, int] = {}
        place = {}
        for path, content in self.made():
            if content is None:
                continue
            name = hashlib.sha256(content).hexdigest()[:NAME_LENGTH] + ".webp"
            if name not in seen:
                seen[name] = len(addresses)
                addresses.append(f"{folder.name}/{name}")
                write_atomic(folder / name, partial(_write, content))
            place[path] = seen[name]
        return addresses, place

    def smaller(self) -> bool:
        """Go one size down; False when there is none."""
        at = SIZES.index((self.side, self.quality))
        if at + 1 == len(SIZES):
            return False
        self.side, self.quality = SIZES[at + 1]
        self._made.clear()
        return True


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def remove_pictures(folder: Path) -> None:
    """Those :meth:`Thumbnails.beside` wrote there before, and nothing else."""
    for path in folder.glob("*.webp"):
        if len(path.stem) == NAME_LENGTH and set(path.stem) <= set("0123456789abcdef"):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def thumbnail(path: Path, side: int, quality: int) -> bytes | None:
    """WebP no wider or higher than ``side``, never enlarged; None for a file that is no readable picture."""
    try:
        with Image.open(path) as image:
            picture = as_shown(image)
    except UNREADABLE:
        return None
    stream = io.BytesIO()
    # small pictures have edges that compression would blur
    lossless = max(picture.size) <= PIXEL_ART and max(picture.size) <= side
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(stream, "WEBP", quality=quality, lossless=lossless, method=2)
    return stream.getvalue()
