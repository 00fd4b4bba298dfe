"""The bundled model's vision tower: a small convolutional network, and the time of day of every frame."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from server.models.device import to_device
from server.models.lm.decoder import RMSNorm
from server.models.slices import Slices, whole
from server.models.tiny.preprocess import resize
from server.video.frames import Frames

EPS = 1e-6
_FRAMES_A_SLICE = 4
"""At least. A single frame runs through other kernels, which round in another way."""


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(functional.gelu(self.conv1(self.norm(x))))
        return out


class Block(nn.Module):
    """A transformer block over the cells of one frame."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = RMSNorm(size, EPS), RMSNorm(size, EPS)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.up = nn.Linear(size, 3 * size, bias=False)
        self.down = nn.Linear(3 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x))
        q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # A frame has 24 cells: plain matrix products beat an attention kernel.
        mix = (q @ k.transpose(-1, -2)).float().mul(q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        x = x + self.out((mix @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class TimeEmbedding(nn.Module):
    """The sum of four digit embeddings, mm:ss; covers 0 s to 99:59."""

    MAX_S = 6000

    def __init__(self, size: int) -> None:
        super().__init__()
        self.digits = nn.Embedding(40, size)

    def forward(self, seconds: Tensor) -> Tensor:
        """int64 [n] -> [n, size]."""
        digits = torch.stack([seconds // 600 % 10, seconds // 60 % 10, seconds % 60 // 10, seconds % 10], -1)
        out: Tensor = self.digits(digits + 10 * torch.arange(4, device=seconds.device)).sum(-2)
        return out


class TinyEncoder(nn.Module):
    """Frames of 96x64 -> 4x6 cells -> 4 visual tokens a frame (each merges a row of cells), plus its time."""

    TOKENS_PER_FRAME = 4
    GRID = (4, 6)

    def __init__(self, size: int) -> None:
        super().__init__()
        cells = self.GRID[0] * self.GRID[1]
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GELU(),
            Residual(64),
            nn.Conv2d(64, 128, 3, 2, 1),
            nn.GELU(),
            Residual(128),
            nn.Conv2d(128, size, 3, 2, 1),
        )
        self.position = nn.Parameter(torch.zeros(cells, size))
        self.blocks = nn.ModuleList(Block(size, 8) for _ in range(2))
        self.norm = RMSNorm(size, EPS)
        merged = cells // self.TOKENS_PER_FRAME * size
        self.projector = nn.Sequential(nn.Linear(merged, size), nn.GELU(), nn.Linear(size, size))
        self.time = TimeEmbedding(size)

    def preprocess(self, frames: Frames) -> Tensor:
        """uint8 [T, 3, 64, 96]."""
        return resize(frames.pixels)

    def cells(self, pixels: Tensor) -> Tensor:
        """[T, 3, 64, 96] in 0..1 -> [T, 24, size]."""
        x = self.convs(pixels * 2 - 1).flatten(2).transpose(1, 2)
        x = x + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def tokens(self, cells: Tensor, seconds: Tensor) -> Tensor:
        """[T, 24, size] and whole seconds [T] -> [T, 4, size]."""
        merged = self.projector(cells.reshape(len(cells), self.TOKENS_PER_FRAME, -1))
        out: Tensor = merged + self.time(seconds)[:, None].to(merged.dtype)
        return out

    def forward(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Tensor:
        """uint8 [T, 3, 64, 96] and times in seconds -> visual tokens [T * 4, size]."""
        return whole(self.see(pixels, times_s))

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[Tensor]:
        """The same in slices."""
        weight = self.position
        x = pixels.to(weight.device, weight.dtype) / 255
        # Sampling grids like 0.1 s * 10 fall just short of whole seconds.
        seconds = to_device(torch.from_numpy(np.floor(times_s + 1e-6)).long(), weight.device)
        cells: list[Tensor] = []
        for frames in x.tensor_split(max(1, len(x) // _FRAMES_A_SLICE)):
            if cells:
                yield
            cells.append(self.cells(frames))
        return self.tokens(torch.cat(cells), seconds).flatten(0, 1)
