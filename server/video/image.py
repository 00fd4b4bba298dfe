"""A still image as a video of one frame."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from server.video.frames import Frames

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 200
"""Longer side over shorter: a model that scales to the shorter one would blow a sliver up beyond all bounds."""


class ImageError(Exception):
    """What was sent is no image within the limits; ``code`` is stable, the message is for the sender."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def read_image(data: bytes, max_pixels: int) -> Frames:
    """A PNG, JPEG or WebP (of an animated one the first picture) as a frame at 0 s: upright, RGB, on white where it is
    transparent.

    Size and shape are checked before any pixel is decoded. Raises ImageError.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(f"{width} x {height}", max_pixels)
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(f"{width} x {height} pixels are longer than {MAX_ASPECT} to 1", "image_too_long")
            pixels = np.array(_rgb(ImageOps.exif_transpose(image)))  # its own: PIL's may not be written to
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large("these", max_pixels) from None
    except UnidentifiedImageError:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})", "invalid_image") from None
    except (ImageError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # Pillow raises nearly anything where bytes are missing or damaged: struct.error, TypeError
        raise ImageError("the image is cut off or damaged", "image_damaged") from error
    return Frames(pixels[None], np.zeros(1))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _too_large(size: str, max_pixels: int) -> ImageError:
    return ImageError(f"{size} pixels are too many: at most {max_pixels} are allowed", "image_too_large")
