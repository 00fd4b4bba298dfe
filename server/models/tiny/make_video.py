"""The synthetic benchmark: a real H.264 mp4 and questions about it (``x2l make-video``)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from server.models.tiny.exam import Examiner, ExamQuestion
from server.models.tiny.render import (
    HEIGHT,
    MAX_BOB,
    MAX_DRIFT,
    PLATE_HEIGHT,
    PLATE_WIDTH,
    WIDTH,
    background,
    object_box,
    object_color,
    object_mask,
    plate_color,
    plate_corner,
    plate_masks,
)
from server.models.tiny.world import FIRST_TRAINING_SEED, NUM_SHOT_LOOKS, Script, sample_scripts

SIZES = ((320, 240), (426, 240), (480, 270), (480, 360), (640, 360))
FRAME_RATES = (10, 12, 15)
MAX_CHUNKS = 375  # the model tells times up to 99:59

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoPlan:
    """All choices of a synthetic video. Tick k is on screen during ``[k - phase_s, k + 1 - phase_s)``."""

    script: Script  # of one video
    questions: list[ExamQuestion]
    width: int
    height: int
    frame_rate: int
    gop_s: int
    crf: int
    phase_s: float

    @property
    def duration_s(self) -> int:
        return self.script.num_ticks


def plan_video(seed: int, chunks: int) -> VideoPlan:
    """The video of a seed, the same on every machine. Raises ValueError for a seed or length out of range."""
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise ValueError(f"the seed must lie in 0..{FIRST_TRAINING_SEED - 1}, got {seed}")
    if not 1 <= chunks <= MAX_CHUNKS:
        raise ValueError(f"the number of chunks must lie in 1..{MAX_CHUNKS}, got {chunks}")
    rng = Random(seed)
    width, height = rng.choice(SIZES)
    frame_rate, gop_s, crf, phase_s = rng.choice(FRAME_RATES), rng.randint(2, 10), rng.randint(18, 32), 0.1
    while not 0.1 < phase_s < 0.9:
        phase_s = rng.random()
    script = sample_scripts(1, chunks, torch.Generator().manual_seed(seed))
    return VideoPlan(script, Examiner(script, rng).exam(), width, height, frame_rate, gop_s, crf, phase_s)


def make_video(path: str | Path, seed: int = 0, chunks: int = 16) -> dict[str, Any]:
    """Write an mp4 to ``path`` and its questions beside it (``.json``); returns what the JSON holds.

    ``start_s`` and ``end_s`` bound the span from the first to the last second that holds the answer, ``chunks`` lists
    its chunks; an ``exist`` question answered No has null, null and an empty list. Both files appear whole or not at
    all. Raises ValueError for a path that does not end in .mp4 and as :func:`plan_video`, OSError when the folder
    cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"the path must end in .mp4, got {path}")
    plan = plan_video(seed, chunks)
    exam: dict[str, Any] = {
        "seed": seed,
        "chunks": chunks,
        "duration_s": plan.duration_s,
        "questions": [exam_entry(question, plan.phase_s) for question in plan.questions],
    }
    video, answers = path.with_name(path.name + ".part"), path.with_suffix(".json.part")
    try:
        _encode(plan, video)
        answers.write_text(json.dumps(exam, indent=2) + "\n")
        answers.replace(path.with_suffix(".json"))
        video.replace(path)
    finally:
        video.unlink(missing_ok=True)
        answers.unlink(missing_ok=True)
    return exam


def exam_entry(question: ExamQuestion, phase_s: float) -> dict[str, Any]:
    """A question as OUT.json holds it; times in seconds of the video."""
    entry: dict[str, Any] = {"question": question.question, "answer": question.answer, "type": question.type}
    start = min((start for start, _ in question.spans), default=None)
    end = max((end for _, end in question.spans), default=None)
    # From the second named in answers to the moment the last tick leaves the screen.
    end_s = None if end is None else round(end - phase_s, 3)
    return entry | {"chunks": question.chunks, "start_s": start, "end_s": end_s}


def _encode(plan: VideoPlan, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=plan.frame_rate)
        stream.width, stream.height, stream.pix_fmt = plan.width, plan.height, "yuv420p"
        stream.codec_context.gop_size = plan.gop_s * plan.frame_rate
        # One thread, because several make the same bytes only on machines with equally many cores.
        stream.options = {"crf": str(plan.crf), "preset": "superfast", "sc_threshold": "0", "threads": "1"}
        for index, picture in enumerate(draw_frames(plan)):
            frame = av.VideoFrame.from_numpy_buffer(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, plan.frame_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def draw_frames(plan: VideoPlan) -> Iterator[Picture]:
    """Every frame of the video in order, RGB [height, width, 3], each in the place of the one before."""
    painter = _Painter(plan)
    for index in range(plan.duration_s * plan.frame_rate):
        # Whole numbers of frames keep a second's first frame on the right side of a tick's border.
        time_s = index / plan.frame_rate
        yield painter.frame(min(math.floor(time_s + plan.phase_s), plan.duration_s - 1), time_s)


class _Painter:
    """Draws a shot's background and object and a tick's plates once; a frame only puts them together."""

    def __init__(self, plan: VideoPlan) -> None:
        self._script, self._width, self._height, self._phase_s = plan.script, plan.width, plan.height, plan.phase_s
        self._x_scale, self._y_scale = WIDTH / plan.width, HEIGHT / plan.height
        self._margin = math.floor(MAX_DRIFT / self._x_scale)
        self._start = self._tick = -1
        self._picture: Picture = np.empty((plan.height, plan.width, 3), np.uint8)

    def frame(self, tick: int, time_s: float) -> Picture:
        start = int(self._script.starts[0, tick])
        if start != self._start:
            self._start = start
            self._draw_shot(start)
        if tick != self._tick:
            self._tick = tick
            self._plates = [self._draw_plate(tick, position) for position in (0, 1)]
        progress = (time_s + self._phase_s - start) / int(self._script.lengths[0, start])
        left = round(2 * self._margin * min(max(progress, 0.0), 1.0))
        picture = self._picture
        picture[:] = self._canvas[:, left : left + self._width]
        bob = MAX_BOB * math.sin(2 * math.pi * (0.7 * time_s + self._bob_phase))
        top = self._object_top + round(bob / self._y_scale)
        height, width = self._object.shape
        region = picture[top : top + height, self._object_left : self._object_left + width]
        np.copyto(region, self._object_color, where=self._object[..., None])
        for row, column, plate in self._plates:
            picture[row : row + plate.shape[0], column : column + plate.shape[1]] = plate
        return picture

    def _grid(self, left: int, top: int, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Model-pixel centres x [1, 1, width] and y [1, height, 1] of a rectangle of output pixels."""
        x = (torch.arange(left, left + width, dtype=torch.float32) + 0.5) * self._x_scale
        y = (torch.arange(top, top + height, dtype=torch.float32) + 0.5) * self._y_scale
        return x[None, None, :], y[None, :, None]

    def _draw_shot(self, start: int) -> None:
        looks, objects = self._script.looks[0, start : start + 1], self._script.objects[0, start : start + 1]
        x, y = self._grid(-self._margin, 0, self._width + 2 * self._margin, self._height)
        self._canvas = _pixels(background(looks, x, y)[0].permute(1, 2, 0))
        self._bob_phase = float(looks[0, NUM_SHOT_LOOKS - 1])
        center_x, center_y, radius = (float(value) for value in object_box(looks))
        left, top = int((center_x - radius) / self._x_scale), int((center_y - radius) / self._y_scale)
        width, height = int(2 * radius / self._x_scale) + 2, int(2 * radius / self._y_scale) + 2
        mask = object_mask(objects, looks, *self._grid(left, top, width, height), torch.zeros(1))[0].numpy()
        self._object_left, self._object_top, self._object = left, top, mask[:, : self._width - left]
        self._object_color = _pixels(object_color(objects, looks)[0])

    def _draw_plate(self, tick: int, position: int) -> tuple[int, int, Picture]:
        """Top row, left column and pixels of a plate."""
        looks = self._script.looks[0, tick : tick + 1]
        code, label = (
            self._script.codes[0, tick : tick + 1, position],
            self._script.plates[0, tick : tick + 1, position],
        )
        left, top = (float(value) for value in plate_corner(looks, position))
        column, row = math.ceil(left / self._x_scale - 0.5), math.ceil(top / self._y_scale - 0.5)
        width = math.ceil((left + PLATE_WIDTH) / self._x_scale - 0.5) - column
        height = math.ceil((top + PLATE_HEIGHT) / self._y_scale - 0.5) - row
        _, ink = plate_masks(code, looks, *self._grid(column, row, width, height), position)
        color, text = plate_color(label, looks, position)
        return row, column, _pixels(torch.where(ink[0, :, :, None], text[0], color[0]))


def _pixels(color: torch.Tensor) -> Picture:
    return (color.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
