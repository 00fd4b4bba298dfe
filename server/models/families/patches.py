"""Frames as the flat patches that the vision towers of the Qwen-VL families take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from server.models.device import kept, to_device
from server.models.families.one_pass import Layout, VisualTokens
from server.models.families.packed_attention import PackedAttention
from server.models.families.preprocessing import read_image_preprocessing, read_preprocessing
from server.models.slices import Slices, through, whole
from server.models.tensors import CheckpointError
from server.video.errors import VideoUnsupported
from server.video.frames import Frames

FRAME_TOKENS = 128, 134
"""Least and most visual tokens of one step in time. The most is what Qwen2.5-VL's published preprocessing leaves a long
video (1.05 times the least), whatever this one's length: a frame's size must not depend on how many follow. What a
folder says of sizes counts for images only: for videos it is about a whole one."""
BEFORE, AFTER = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True, slots=True)
class Patches:
    """``patch_size`` pixels square and ``temporal_patch_size`` frames deep; ``merge_size`` squared of them are one
    visual token. Frames are resized, keeping their aspect ratio, to between ``min_pixels`` and ``max_pixels``; or all
    of them to ``frame_size``, a width and a height in pixels.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frame_size: tuple[int, int] | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        vision: Any,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        frame_tokens: tuple[int, int],
        frame_size: tuple[int, int] | None = None,
    ) -> Self:
        """``vision`` is the configuration of the vision tower; ``mean`` and ``std`` are the family's, unless the folder
        says otherwise; ``frame_tokens`` as in FRAME_TOKENS. Raises CheckpointError for a ``frame_size`` that is not
        made of whole visual tokens."""
        factor = vision.patch_size * vision.spatial_merge_size
        if frame_size is not None and any(side <= 0 or side % factor for side in frame_size):
            raise CheckpointError(f"frame_size must be multiples of {factor} pixels, not {list(frame_size)}")
        found = read_preprocessing(folder)
        return cls(
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
            frame_tokens[0] * factor**2,
            frame_tokens[1] * factor**2,
            tuple(found.get("image_mean") or mean),
            tuple(found.get("image_std") or std),
            frame_size,
        )

    def for_images(self, folder: Path) -> Self:
        """The patches of still images, which keep their aspect ratio: how large they may be is what the folder says, or
        else the families' own."""
        found = read_image_preprocessing(folder)
        size = found.get("size") or {}
        usual = Qwen2VLImageProcessorPil.size
        return replace(
            self,
            frame_size=None,
            min_pixels=found.get("min_pixels") or size.get("shortest_edge") or usual["shortest_edge"],
            max_pixels=found.get("max_pixels") or size.get("longest_edge") or usual["longest_edge"],
            mean=tuple(found.get("image_mean") or self.mean),
            std=tuple(found.get("image_std") or self.std),
        )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of visual tokens for frames of this size in pixels. Raises VideoUnsupported."""
        factor = self.patch_size * self.merge_size
        if self.frame_size is not None:
            return self.frame_size[1] // factor, self.frame_size[0] // factor
        try:
            rows, columns = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise VideoUnsupported(f"The model cannot see {width} x {height} pixels: {error}.") from error
        return rows // factor, columns // factor

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """Visual tokens of so many frames; the last one stands in for those that a patch is short of."""
        rows, columns = self.size(width, height)
        return -(-num_frames // self.temporal_patch_size) * rows * columns

    def resize(self, frames: Frames) -> Tensor:
        """See :func:`resize`. Raises VideoUnsupported."""
        factor = self.patch_size * self.merge_size
        _, height, width, _ = frames.pixels.shape
        rows, columns = self.size(width, height)
        target = columns * factor, rows * factor
        return resize(frames, target)

    def flatten(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """uint8 [T, 3, h, w] -> float32 [patches, 3 * temporal_patch_size * patch_size**2], normalized, the patches of
        a visual token next to each other; and their number in time, height and width."""
        mean, std = (kept(each, pixels.device)[:, None, None] for each in (self.mean, self.std))
        missing = -len(pixels) % self.temporal_patch_size
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        normal = (pixels.float() / 255 - mean) / std
        side, merge = self.patch_size, self.merge_size
        steps, rows, columns = len(pixels) // self.temporal_patch_size, pixels.shape[2] // side, pixels.shape[3] // side
        shape = steps, self.temporal_patch_size, 3, rows // merge, merge, side, columns // merge, merge, side
        patches = normal.reshape(shape).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return patches.reshape(steps * rows * columns, -1), (steps, rows, columns)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where visual tokens stand that are seen together: ``positions`` int64 [3, tokens], from 0 on; what follows goes
    on at ``size``."""

    positions: Tensor
    size: int

    @classmethod
    def of(cls, tokens: VisualTokens, steps: Tensor) -> Self:
        """At every one of ``steps`` [n] in time, int64, all rows and columns; as if time took no positions."""
        axes = torch.meshgrid(steps, torch.arange(tokens.rows), torch.arange(tokens.columns), indexing="ij")
        return cls(torch.stack(axes).flatten(1), max(tokens.rows, tokens.columns))


class Words:
    """The text that stands around what is seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, embed_tokens: nn.Embedding) -> None:
        self._tokenizer = tokenizer
        self.embed = embed_tokens.forward
        """int64 [n] -> [n, hidden]. The method alone: the module is the decoder's."""

    def ids(self, text: str) -> list[int]:
        """Its tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class PatchTower(nn.Module, ABC):
    """transformers' own vision tower over patches; a :class:`server.models.families.one_pass.VisionTower`."""

    def __init__(self, visual: Any, patches: Patches, image_patches: Patches, words: Words) -> None:
        super().__init__()
        for block in visual.blocks:
            block.attn = PackedAttention(block.attn)
        self.visual = visual
        self.patches = patches
        self.image_patches = image_patches
        self.words = words

    @property
    @abstractmethod
    def settings(self) -> object:
        """See :meth:`VisionTower.settings`."""

    @abstractmethod
    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> int:
        """See :meth:`VisionTower.num_positions`."""

    @abstractmethod
    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """See :meth:`VisionTower.lay_out`."""

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VisionTower.preprocess`: uint8."""
        return self.patches.resize(frames)

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`VisionTower.num_tokens`."""
        return self.patches.num_tokens(num_frames, width, height)

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Tensor:
        """See :meth:`VisionTower.preprocess_image`: uint8."""
        return self.image_patches.resize(frame)

    def num_image_tokens(self, image: Tensor) -> int:
        """See :meth:`VisionTower.num_image_tokens`."""
        side = self.image_patches.patch_size * self.image_patches.merge_size
        return (image.shape[2] // side) * (image.shape[3] // side) + len(self.words.ids(BEFORE + AFTER))

    def see_image(self, image: Tensor) -> VisualTokens:
        """See :meth:`VisionTower.see_image`."""
        return whole(self._see(self.image_patches, image.to(self.visual.device), np.zeros(1)))

    def lay_out_image(self, tokens: VisualTokens, next_position: int) -> Layout:
        """See :meth:`VisionTower.lay_out_image`."""
        return self.compose([BEFORE, Grid.of(tokens, torch.zeros(1).long()), AFTER], next_position)

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[VisualTokens]:
        """See :meth:`VisionTower.see`."""
        return self._see(self.patches, pixels, times_s)

    def compose(self, parts: Sequence[str | Grid], next_position: int) -> Layout:
        """Texts and visual tokens, one behind the other; ``next_position`` is where the first stands."""
        places: list[Tensor] = []
        is_visual: list[bool] = []
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Grid):
                places.append(part.positions + next_position)
                is_visual += [True] * part.positions.shape[1]
                next_position += part.size
            else:
                text = self.words.ids(part)
                places.append(torch.arange(next_position, next_position + len(text)).expand(3, -1))
                is_visual += [False] * len(text)
                next_position += len(text)
                ids += text
        positions = torch.cat(places, dim=1)
        if not ids:
            return Layout(positions, next_position)
        others = self.words.embed(to_device(torch.tensor(ids), self.visual.device))
        return Layout(positions, next_position, torch.tensor(is_visual), others)

    def _see(self, kind: Patches, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[VisualTokens]:
        patches, (steps, height, width) = kind.flatten(pixels)
        grid = to_device(torch.tensor([[steps, height, width]]), pixels.device)
        patches = patches.to(self.visual.dtype)
        output = yield from through(lambda: self.visual(patches, grid_thw=grid), self.visual.blocks)
        deep = getattr(output, "deepstack_features", None)
        merge, depth = kind.merge_size, kind.temporal_patch_size
        first = times_s[::depth]
        last = np.append(times_s[depth - 1 :: depth], times_s[-1])[: len(first)]
        return VisualTokens(
            output.pooler_output,
            height // merge,
            width // merge,
            np.stack([first, last], axis=1),
            torch.stack(deep) if deep else None,
        )


def resize(frames: Frames, size: tuple[int, int]) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, h, w], to a width and height, with torch's bicubic filter for bytes, which the
    original processors use too.

    PIL's gives the same but for rounding. It takes three times as long, and keeps the interpreter for milliseconds a
    frame: streams would stutter whenever a chunk of an upload comes in.
    """
    pixels = torch.from_numpy(frames.pixels).permute(0, 3, 1, 2)
    return functional.interpolate(pixels, size[::-1], mode="bicubic", antialias=True).contiguous()
