"""Draws ticks of a script at any size: pure tensor operations of static shape (torch.compile fuses them).

Geometry is in *model pixels*: the picture is 96 wide and 64 high whatever the output size, so a large picture averaged
down to 96 x 64 looks like one drawn there. Rows 0 to 16 hold the upper plate, 48 to 64 the lower one, the object lives
between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from server.models.tiny.font import GLYPHS, SHAPE_MASKS, SHAPE_SIZE
from server.models.tiny.world import COLORS, NUM_SHOT_LOOKS, NUM_TICK_LOOKS, PLATE_COLORS, SHAPES, Script

WIDTH, HEIGHT = 96, 64
PLATE_WIDTH, PLATE_HEIGHT = 38.0, 16.0
GLYPH_SCALE = 2.0
MAX_BOB, MAX_DRIFT = 1.5, 4.0
_NUM_CLUTTER = 4


def grid(
    width: int, height: int, device: torch.device | str, dx: float = 0.5, dy: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Model-pixel coordinates x [1, width] and y [height, 1] of the point (dx, dy) inside every output pixel."""
    x = (torch.arange(width, device=device, dtype=torch.float32) + dx) * (WIDTH / width)
    y = (torch.arange(height, device=device, dtype=torch.float32) + dy) * (HEIGHT / height)
    return x[None, :], y[:, None]


def _between(look: Tensor, index: int, low: float, high: float) -> Tensor:
    return (low + (high - low) * look[:, index])[:, None, None]


def background(looks: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The scene behind everything: [n, 3, h, w] in 0..1 at coordinates x, y (broadcastable to [n, h, w])."""
    one, two = 0.12 + 0.55 * looks[:, 0:3, None, None], 0.12 + 0.55 * looks[:, 3:6, None, None]
    angle = _between(looks, 6, 0, 2 * math.pi)
    ramp = ((x - 48) * torch.cos(angle) + (y - 32) * torch.sin(angle)) / 96 + _between(looks, 7, 0.3, 0.7)
    tilt, pitch = _between(looks, 8, 0, math.pi), _between(looks, 9, 0.12, 0.9)
    stripes = torch.sin((x * torch.cos(tilt) + y * torch.sin(tilt)) * pitch)
    ramp = (ramp + (_between(looks, 10, -0.3, 0.35)).clamp(min=0) * stripes).clamp(0, 1)[:, None]
    image = one * (1 - ramp) + two * ramp
    for k in range(_NUM_CLUTTER):
        at = 11 + 5 * k
        left, top = x - _between(looks, at, 0, 96), y - _between(looks, at + 1, 0, 64)
        half, tall = _between(looks, at + 2, 2, 12), _between(looks, at + 3, 2, 10)
        inside = (left.abs() < half) & (top.abs() < tall) if k % 2 else left * left + top * top < half * half
        shade = 0.1 + 0.7 * torch.stack([looks[:, (at + 4 + c * 5) % 31] for c in range(3)], 1)[:, :, None, None]
        image = torch.where(inside[:, None], 0.45 * image + 0.55 * shade, image)
    # Speckles: a hash of the cell, so that the pattern is the same at every output size.
    cell = _between(looks, 31, 1.5, 5)
    speckle = torch.sin(torch.floor(x / cell) * 12.9898 + torch.floor(y / cell) * 78.233 + _between(looks, 32, 0, 9))
    speckle = speckle * 437.58
    speckle = speckle - torch.floor(speckle) - 0.5
    return image + (_between(looks, 33, -0.1, 0.25).clamp(min=0) * speckle)[:, None]


def object_box(looks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, centre y (at rest) and radius [n] of the object, in model pixels."""
    radius = 11 + 3.5 * looks[:, 34]
    return radius + 1 + (WIDTH - 2 * radius - 2) * looks[:, 35], torch.full_like(radius, 32.0), radius


def object_mask(objects: Tensor, looks: Tensor, x: Tensor, y: Tensor, bob: Tensor) -> Tensor:
    """[n, h, w] bool: where the object is; ``bob`` [n] shifts it downwards."""
    center_x, center_y, radius = (t[:, None, None] for t in object_box(looks))
    u = ((x - center_x) / radius + 1) * (SHAPE_SIZE / 2)
    v = ((y - center_y - bob[:, None, None]) / radius + 1) * (SHAPE_SIZE / 2)
    inside = (u >= 0) & (u < SHAPE_SIZE) & (v >= 0) & (v < SHAPE_SIZE)
    column, row = u.clamp(0, SHAPE_SIZE - 1).long(), v.clamp(0, SHAPE_SIZE - 1).long()
    shape = (objects % len(SHAPES))[:, None, None]
    return inside & SHAPE_MASKS.to(x.device).view(-1)[(shape * SHAPE_SIZE + row) * SHAPE_SIZE + column]


def object_color(objects: Tensor, looks: Tensor) -> Tensor:
    """[n, 3] in 0..1."""
    palette = torch.tensor(list(COLORS.values()), device=objects.device, dtype=torch.float32) / 255
    return palette[objects // len(SHAPES)] * (0.85 + 0.15 * looks[:, 36:37])


def plate_corner(looks: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Left and top [n] of the upper (0) or lower (1) plate, in model pixels."""
    tick = looks[:, NUM_SHOT_LOOKS:]
    top = tick[:, 2 + position]
    return 0.5 + (WIDTH - PLATE_WIDTH - 1) * tick[:, position], top + position * (HEIGHT - PLATE_HEIGHT - 1)


def plate_color(plates: Tensor, looks: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Plate and text colours [n, 3] in 0..1; ``plates`` [n] indexes PLATE_COLORS."""
    palette = torch.tensor(list(PLATE_COLORS.values()), device=plates.device, dtype=torch.float32) / 255
    color = palette[plates]
    dark = (color @ torch.tensor([0.3, 0.59, 0.11], device=plates.device) < 0.5).float()[:, None]
    shade = 0.88 + 0.12 * looks[:, NUM_SHOT_LOOKS + 4 + position, None]
    return color * shade, (0.05 + 0.9 * dark).expand(-1, 3)


def plate_masks(codes: Tensor, looks: Tensor, x: Tensor, y: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Where the plate and where its glyphs are, [n, h, w] bool each; ``codes`` [n, 3]."""
    left, top = (t[:, None, None] for t in plate_corner(looks, position))
    x, y = x - left, y - top
    plate = (x >= 0) & (x < PLATE_WIDTH) & (y >= 0) & (y < PLATE_HEIGHT)
    column, row = torch.floor((x - 2) / GLYPH_SCALE), torch.floor((y - 1) / GLYPH_SCALE)
    inside = (column >= 0) & (column < 17) & (row >= 0) & (row < 7)
    letters = GLYPHS.to(x.device)[codes]  # [n, 3, 7, 5]
    line = torch.nn.functional.pad(letters, (0, 1)).permute(0, 2, 1, 3).reshape(len(codes), 7 * 18)
    index = (row.clamp(0, 6) * 18 + column.clamp(0, 16)).long()
    return plate, inside & line.gather(1, index.flatten(1)).view(index.shape)


def draw(objects: Tensor, codes: Tensor, plates: Tensor, looks: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One sample a pixel: [n, 3, h, w] in 0..1. Arguments as in :func:`render`."""
    motion = looks[:, NUM_SHOT_LOOKS + 6 :] * 2 - 1
    image = background(looks, x + MAX_DRIFT * motion[:, 0, None, None], y)
    mask = object_mask(objects, looks, x, y, MAX_BOB * motion[:, 1])
    image = torch.where(mask[:, None], object_color(objects, looks)[:, :, None, None], image)
    for position in (0, 1):
        color, text = (t[:, :, None, None] for t in plate_color(plates[:, position], looks, position))
        plate, ink = plate_masks(codes[:, position], looks, x, y, position)
        image = torch.where(plate[:, None], color, image)
        image = torch.where(ink[:, None], text, image)
    return image.clamp(0, 1)


def render(
    objects: Tensor,
    codes: Tensor,
    plates: Tensor,
    looks: Tensor,
    width: int = WIDTH,
    height: int = HEIGHT,
    samples: int = 2,
) -> Tensor:
    """Draw n ticks: float32 [n, 3, height, width] in 0..1.

    ``objects`` [n], ``codes`` [n, 2, 3], ``plates`` [n, 2] int64 and ``looks`` [n, 48] float32 are rows of a
    :class:`Script`. A pixel is the mean of ``samples`` x ``samples`` points (2 and more at model size, where a glyph's
    edge falls inside pixels; 1 is enough at video sizes).
    """
    assert looks.shape[1] == NUM_SHOT_LOOKS + NUM_TICK_LOOKS
    image: Tensor | None = None
    for i in range(samples):
        for j in range(samples):
            x, y = grid(width, height, looks.device, (i + 0.5) / samples, (j + 0.5) / samples)
            part = draw(objects, codes, plates, looks, x[None], y[None])
            image = part if image is None else image + part
    assert image is not None
    return image / samples**2


def render_script(script: Script, samples: int = 2) -> Tensor:
    """All ticks of a script at model size: [V, T, 3, 64, 96] in 0..1."""
    flat = render(
        script.objects.flatten(), script.codes.flatten(0, 1), script.plates.flatten(0, 1), script.looks.flatten(0, 1),
        samples=samples,
    )  # fmt: skip
    return flat.view(*script.objects.shape, 3, HEIGHT, WIDTH)
