"""What a picture is when it is not 8-bit RGB: as a viewer shows it, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import EnvironmentFault
from sdo_cli.evaluation.folders import read_folder
from sdo_cli.pixels import perhaps_unfinished, transparent
from sdo_cli.reports.pictures import thumbnail

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)


def read(path):
    return (read_image(path) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_depths_and_palettes(tmp_path):
    grey = np.repeat(RAMP[..., None], 3, -1)
    wide = RAMP.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "16.png")
    Image.fromarray(wide).save(tmp_path / "16.tif")
    Image.fromarray(RAMP).save(tmp_path / "8.png")
    for name in ("16.png", "16.tif", "8.png"):
        assert np.array_equal(read(tmp_path / name), grey), name
    Image.fromarray(np.minimum(wide, 65000) + 100).save(tmp_path / "between.png")
    assert np.abs(read(tmp_path / "between.png").astype(int) - grey).max() <= 2
    Image.fromarray(RAMP > 127).save(tmp_path / "1.png")
    assert np.array_equal(read(tmp_path / "1.png"), np.where(grey > 127, 255, 0))
    few = Image.fromarray(COLOUR).quantize(16)
    few.save(tmp_path / "p.png")
    assert np.array_equal(read(tmp_path / "p.png"), np.asarray(few.convert("RGB")))


def test_transparency_is_put_on_white_and_said(tmp_path):
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, :8], alpha[:, 8:12] = 0, 128
    whole = np.full_like(alpha, 255)
    Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "0.png")
    Image.fromarray(np.dstack([COLOUR, whole])).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([RAMP, alpha]), "LA").save(tmp_path / "2.png")
    Image.fromarray(COLOUR).quantize(16).save(tmp_path / "3.png", transparency=0)
    Image.fromarray(COLOUR).save(tmp_path / "4.png", transparency=(0, 0, 255))
    found = read(tmp_path / "0.png")
    assert (found[:, :8] == 255).all() and np.array_equal(found[:, 12:], COLOUR[:, 12:])
    blended = COLOUR[:, 8:12] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(found[:, 8:12] - blended).max() <= 1
    assert np.array_equal(read(tmp_path / "1.png"), COLOUR)
    assert (read(tmp_path / "2.png")[:, :8] == 255).all()
    assert (read(tmp_path / "4.png")[0, 0] == 255).all() and (read(tmp_path / "4.png")[1, 1] == COLOUR[1, 1]).all()
    assert [transparent(tmp_path / f"{k}.png") for k in range(5)] == [True, False, True, True, True]
    seen = np.asarray(Image.open(io.BytesIO(thumbnail(tmp_path / "0.png", 64, 80))))
    assert np.array_equal(seen, found), "a report shows what was scored"
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text("a ramp")
    assert "4 pictures partly transparent and put on white, 0.png first" in read_folder(tmp_path, None).notes[-1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR[:8]).save(tmp_path / "t.png", exif=exif)
    shown = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90,
    }[orientation]
    assert np.array_equal(read(tmp_path / "t.png"), shown(COLOUR[:8]))


def test_inks_need_a_profile(tmp_path):
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(EnvironmentFault, match="its colours are CMYK without a profile; save it as RGB"):
        read_image(tmp_path / "c.jpg")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.createProfile("sRGB")
    turned = ImageCms.profileToProfile(Image.fromarray(COLOUR), srgb, ImageCms.createProfile("LAB"), outputMode="LAB")
    turned.save(tmp_path / "l.tif", icc_profile=lab)
    assert np.abs(read(tmp_path / "l.tif").astype(int) - COLOUR).mean() < 3
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "w.tif", icc_profile=lab)
    with pytest.raises(EnvironmentFault, match="its colour profile cannot be used"):
        read_image(tmp_path / "w.tif")


def test_what_cannot_be_right_is_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(EnvironmentFault, match="have no known range; save it as 8 or 16 bits"):
            read_image(tmp_path / name)
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    for name in ("a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(EnvironmentFault, match="holds 2 frames or pages; save the one that is meant"):
            read_image(tmp_path / name)
    Image.fromarray(COLOUR).save(tmp_path / "cut.png", pnginfo=PngInfo())
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(EnvironmentFault, match=r"cut.png is no readable image"):
        read_image(tmp_path / "cut.png")


def test_a_picture_too_large_to_be_one_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    with pytest.raises(EnvironmentFault, match=r"b.png is no readable image: .*pixels"):
        read_image(tmp_path / "b.png")


def test_grey_of_16_bits_with_a_value_for_nothing(tmp_path):
    wide = RAMP.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "t.png", transparency=257 * 7)
    # Pillow writes no such chunk for 16 bits
    data = (tmp_path / "t.png").read_bytes()
    if b"tRNS" not in data:
        body = b"tRNS" + struct.pack(">H", 257 * 7)
        chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
        (tmp_path / "t.png").write_bytes(data[:33] + chunk + data[33:])
    expected = np.repeat(np.where(RAMP == 7, 255, RAMP)[..., None], 3, -1)
    assert np.array_equal(read(tmp_path / "t.png"), expected) and transparent(tmp_path / "t.png")


def test_tiffs_whose_least_value_is_white(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "t.tif", tiffinfo={262: 0})
    assert np.array_equal(read(tmp_path / "t.tif"), np.repeat(255 - RAMP[..., None], 3, -1))


def test_colour_of_16_bits_is_its_high_byte_as_the_rewards_own_code_reads_it(tmp_path):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = b"\0" + struct.pack(">3H", 0x01FE, 0x1234, 0xFFFF)
    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert read(tmp_path / "c.png").tolist() == [[[1, 0x12, 255]]]


def runs_of(values):
    """BMP of 8 bits with runs, as Windows Paint writes it; Pillow writes none."""
    height, width = values.shape
    rows = b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in values[::-1].tolist())
    body = rows[:-2] + b"\0\1"
    palette = b"".join(bytes([k, k, k, 0]) for k in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 1078 + len(body), 0, 0, 1078) + info + palette + body


def test_runs_of_a_bmp_that_was_not_copied_to_its_end(tmp_path):
    values = np.random.default_rng(1).integers(1, 256, (32, 32), dtype=np.uint8)
    whole = runs_of(values)
    (tmp_path / "r.bmp").write_bytes(whole)
    assert (read(tmp_path / "r.bmp")[..., 0] == values).all()
    (tmp_path / "r.bmp").write_bytes(whole + bytes(4096))
    read(tmp_path / "r.bmp")
    (tmp_path / "r.bmp").write_bytes(whole[:-1024] + bytes(1024))
    with pytest.raises(EnvironmentFault, match="it ends in zeros, as a copy does that was interrupted"):
        read_image(tmp_path / "r.bmp")


@pytest.mark.parametrize("name", ["z.bmp", "z.tif"])
def test_plain_pixels_that_end_at_a_block_are_told_from_black(tmp_path, name):
    noise = np.random.default_rng(0).integers(1, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert not perhaps_unfinished(tmp_path / name)
    (tmp_path / name).write_bytes(whole[:8192] + bytes(len(whole) - 8192))
    assert perhaps_unfinished(tmp_path / name)
    # shorter than its header says it is refused
    (tmp_path / name).write_bytes(whole[:8192])
    with pytest.raises(EnvironmentFault, match="truncated"):
        read_image(tmp_path / name)
    # a sky at night
    noise[:32] = noise[-8:] = 0
    Image.fromarray(noise).save(tmp_path / name)
    assert not perhaps_unfinished(tmp_path / name)


@pytest.mark.parametrize("name", ["z.jpg", "z.webp"])
def test_a_copy_that_was_interrupted_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    read(tmp_path / name)
    # the space is there, its last part was never written
    (tmp_path / name).write_bytes(whole[:-512] + bytes(512))
    with pytest.raises(EnvironmentFault, match="it ends in zeros, as a copy does that was interrupted"):
        read_image(tmp_path / name)
    if name == "z.jpg":
        # filled up behind its end, it is whole
        (tmp_path / name).write_bytes(whole + bytes(4096))
        read(tmp_path / name)
