"""Bit maps of the code symbols (5 x 7) and of the object shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.models.tiny.world import SHAPES, SYMBOLS

# Five columns of a glyph as hexadecimal bytes; bit r of a byte is row r from the top.
_GLYPHS = {
    "2": "7249494946", "3": "2141494D33", "4": "1814127F10", "5": "2745454539", "6": "3C4A494931",
    "7": "4121110907", "8": "3649494936", "9": "464949291E", "A": "7C1211127C", "B": "7F49494936",
    "C": "3E41414122", "D": "7F4141413E", "E": "7F49494941", "F": "7F09090901", "G": "3E41415173",
    "H": "7F0808087F", "J": "2040413F01", "K": "7F08142241", "L": "7F40404040", "M": "7F021C027F",
    "N": "7F0408107F", "P": "7F09090906", "R": "7F09192946", "S": "2649494932", "T": "03017F0103",
    "U": "3F4040403F", "V": "1F2040201F", "W": "3F4038403F", "X": "6314081463", "Y": "0304780403",
    "Z": "6159494D43",
}  # fmt: skip
SHAPE_SIZE = 96


def _glyphs() -> Tensor:
    columns = np.array([list(bytes.fromhex(_GLYPHS[symbol])) for symbol in SYMBOLS], dtype=np.uint8)
    bits = (columns[:, None, :] >> np.arange(7, dtype=np.uint8)[None, :, None]) & 1
    return torch.from_numpy(bits.astype(bool))


def _shapes() -> Tensor:
    axis = (np.arange(SHAPE_SIZE) + 0.5) / SHAPE_SIZE * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, ax, ay = np.hypot(x, y), np.abs(x), np.abs(y)
    # The star's edge runs straight-ish between a tip (radius 1) and a notch (0.4), every 36 degrees.
    tip = (np.arctan2(y, x) + np.pi / 2) % (2 * np.pi / 5)
    notch = np.minimum(tip, 2 * np.pi / 5 - tip) / (np.pi / 5)
    hx, hy = 1.15 * x, 0.1 - y
    masks = {
        "circle": radius < 0.92,
        "square": (ax < 0.82) & (ay < 0.82),
        "triangle": (y < 0.8) & (y > -0.9) & (ax < (y + 0.9) * 0.56),
        "star": radius < 1 - 0.6 * notch,
        "ring": (radius < 0.95) & (radius > 0.58),
        "cross": ((ax < 0.3) | (ay < 0.3)) & (ax < 0.92) & (ay < 0.92),
        "diamond": ax / 0.75 + ay < 0.97,
        "heart": (hx**2 + hy**2 - 0.62) ** 3 - 1.3 * hx**2 * hy**3 < 0,
        "moon": (radius < 0.95) & (np.hypot(x - 0.45, y) > 0.78),
        "arrow": ((ay < 0.25) & (x > -0.95) & (x < 0.25)) | ((x >= 0.1) & (ay < (0.95 - x) * 0.85)),
    }
    return torch.from_numpy(np.stack([masks[name] for name in SHAPES]))


GLYPHS = _glyphs()
"""[31, 7, 5] bool, in the order of SYMBOLS."""
SHAPE_MASKS = _shapes()
"""[10, SHAPE_SIZE, SHAPE_SIZE] bool over the square -1..1, rows from the top, in the order of SHAPES."""
