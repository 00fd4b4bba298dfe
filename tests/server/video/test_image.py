from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from server.video.image import ImageError, read_image

PIXELS = 10_000


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_colours(mode: str = "RGB") -> Image.Image:
    """60 x 40: red on the left, blue on the right."""
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 40))
    return image.convert(mode)


def colours(data: bytes) -> list[tuple[int, ...]]:
    """Of the middle of the left and of the right half."""
    pixels = read_image(data, PIXELS).pixels[0]
    return [tuple(map(int, pixels[20, column])) for column in (10, 50)]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_formats(kind: str, options: dict[str, Any]) -> None:
    frames = read_image(encoded(two_colours(), kind, **options), PIXELS)
    assert (frames.pixels.dtype, frames.pixels.shape) == (np.uint8, (1, 40, 60, 3))
    assert frames.times_s.tolist() == [0.0]
    assert len(torch.from_numpy(frames.pixels)) == 1, "which warns of memory that may not be written to"
    for found, true in zip(colours(encoded(two_colours(), kind, **options)), [(255, 0, 0), (0, 0, 255)], strict=True):
        assert np.abs(np.subtract(found, true)).max() <= 3


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_modes_with_colour(mode: str) -> None:
    data = encoded(two_colours(mode), "JPEG" if mode == "CMYK" else "PNG")
    for found, true in zip(colours(data), [(255, 0, 0), (0, 0, 255)], strict=True):
        assert np.abs(np.subtract(found, true)).max() <= 10


def test_grey_of_1_8_and_16_bits() -> None:
    ramp = np.array([[0, 128, 255]], np.uint8).repeat(4, 0)
    assert read_image(encoded(Image.fromarray(ramp)), PIXELS).pixels[0, 0, :, 0].tolist() == [0, 128, 255]
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert read_image(encoded(deep), PIXELS).pixels[0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert read_image(encoded(Image.new("1", (5, 5), 1)), PIXELS).pixels.min() == 255


def test_what_is_transparent_is_white() -> None:
    image = two_colours("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert read_image(encoded(image), PIXELS).pixels[0, 0, 0].tolist() == [255, 255, 255]
    grey = Image.new("LA", (3, 3), (9, 0))
    assert read_image(encoded(grey), PIXELS).pixels.min() == 255


def test_an_image_is_turned_upright() -> None:
    image = two_colours()
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encoded(image, "JPEG", exif=exif, quality=95)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(read_image(data, PIXELS).pixels[0], turned)
    assert turned.shape == (60, 40, 3)


def test_the_first_picture_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(data, PIXELS).pixels[0, 4, 4].tolist() == [255, 0, 0]


def header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has nothing behind it."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + b"\0\0\0\0IDAT"


GOOD = {kind: encoded(Image.effect_noise((90, 90), 50).convert("RGB"), kind) for kind in ("PNG", "JPEG", "WEBP")}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_image"),
        (b"hello, I am a text" * 99, "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (encoded(two_colours(), "GIF"), "invalid_image"),
        (encoded(two_colours(), "TIFF"), "invalid_image"),
        (GOOD["PNG"][: len(GOOD["PNG"]) // 2], "image_damaged"),
        (GOOD["JPEG"][: len(GOOD["JPEG"]) // 2], "image_damaged"),
        (GOOD["PNG"][:200] + b"\0" * 99 + GOOD["PNG"][300:], "image_damaged"),
        (header(101, 100), "image_too_large"),
        (header(40_000, 40_000), "image_too_large"),
        (header(2_000_000_000, 2_000_000_000), "image_too_large"),
        (header(201, 1), "image_too_long"),
        (header(1, 201), "image_too_long"),
        (header(0, 5), None),
        (header(50, 50), "image_damaged"),
    ],
)
def test_what_is_refused(data: bytes, code: str | None) -> None:
    with pytest.raises(ImageError) as refused:
        read_image(data, PIXELS)
    assert code in (None, refused.value.code)


@pytest.mark.parametrize("kind", GOOD)
def test_damage_anywhere_is_an_image_or_an_image_error(kind: str) -> None:
    good = GOOD[kind]
    generator = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        for at in generator.integers(0, len(bad), 4):
            bad[at] = generator.integers(0, 256)
        try:
            frames = read_image(bytes(bad[: generator.integers(1, len(bad) + 1)]), PIXELS)
        except ImageError:
            continue
        assert frames.pixels.dtype == np.uint8 and frames.pixels.ndim == 4
