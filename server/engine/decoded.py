"""A video's frames on their way to the model, chunk by chunk."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compression.chunk import Chunk
from server.models.base import VideoModel
from server.models.device import Arriving
from server.video.frames import Frames

THUMBNAIL_WIDTH = 320


@dataclass(frozen=True, slots=True)
class Decoded:
    """One chunk on its way to the model; ``pixels`` as :meth:`VideoModel.preprocess` makes them, on its device."""

    chunk: Chunk
    pixels: Arriving
    times_s: NDArray[np.float64]
    thumbnail: bytes


def collect(batches: Iterable[Frames], plan: Sequence[Chunk], model: VideoModel) -> Iterator[Decoded]:
    """Cuts the reader's batches into chunks, holding no more of the frames at full size than one batch."""
    waiting = iter(plan)
    chunk = next(waiting)
    parts: list[tuple[Tensor, NDArray[np.float64]]] = []
    num_frames = 0
    thumbnail = b""
    for batch in batches:
        start = 0
        while start < len(batch):
            stop = min(len(batch), start + chunk.num_frames - num_frames)
            part = Frames(batch.pixels[start:stop], batch.times_s[start:stop])
            middle = chunk.num_frames // 2 - num_frames
            if 0 <= middle < len(part):
                thumbnail = draw_thumbnail(part.pixels[middle])
            parts.append((model.preprocess(part), part.times_s))
            num_frames += len(part)
            start = stop
            if num_frames == chunk.num_frames:
                pixels, times_s = zip(*parts, strict=True)
                whole = Arriving.at(model.device, torch.cat(pixels))
                yield Decoded(chunk, whole, np.concatenate(times_s), thumbnail)
                parts, num_frames = [], 0
                chunk = next(waiting, chunk)


def draw_thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of one frame [H, W, 3], at most THUMBNAIL_WIDTH wide."""
    image = Image.fromarray(pixels)
    if image.width > THUMBNAIL_WIDTH:
        height = max(1, round(image.height * THUMBNAIL_WIDTH / image.width))
        image = image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
