"""What a question has the model read behind its mixed cache: images, then text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compression.mixed import MixedCache
from server.engine.errors import ContextLengthExceeded
from server.engine.request import Request
from server.models.base import Row, Turn, VideoModel
from server.models.device import to_device

_GLANCE = 1 << 16
"""Characters."""


class Prompt:
    """The images of a request, each one piece, and then its text in pieces of at most ``step`` tokens: no pass takes
    more than a piece, because a long prompt must not hold up other questions.

    It can be read over several caches, one after the other. Images are encoded once, and live no longer than this.
    """

    def __init__(self, model: VideoModel, request: Request, *, step: int) -> None:
        """Thread-safe. Raises ContextLengthExceeded for a text that is far too long."""
        check_length(model, request.turns)
        ids = model.tokenize(request.turns, behind_media=bool(request.file_ids or request.images))
        self.num_tokens = sum(model.num_image_tokens(image) for image in request.images) + len(ids)
        self._model = model
        self._images = request.images
        self._encoded: list[Any] = []
        self._texts = [ids[start : start + step] for start in range(0, len(ids), step)]
        self._num_read = 0

    def encode(self) -> None:
        """Has the model look at the images, unless it has; before the first piece is read."""
        for image in self._images[len(self._encoded) :]:
            self._encoded.append(self._model.encode_image(image))

    @property
    def at_last(self) -> bool:
        """Whether the next piece is the last one, which is text."""
        return self._num_read == len(self._images) + len(self._texts) - 1

    @property
    def ended(self) -> bool:
        return self._num_read == len(self._images) + len(self._texts)

    def row(self, cache: MixedCache) -> Row:
        """The next piece, to be appended to ``cache``."""
        at = self._num_read - len(self._images)
        device = self._model.device
        if at < 0:
            return Row(torch.empty(0, dtype=torch.int64, device=device), cache, self._encoded[self._num_read])
        return Row(to_device(torch.tensor(self._texts[at]), device), cache)

    def advance(self) -> None:
        """To the piece behind the one that was read."""
        self._num_read += 1

    def rewind(self) -> None:
        """To the first piece, for another cache."""
        self._num_read = 0


def check_length(model: VideoModel, turns: Sequence[Turn]) -> None:
    """Raises ContextLengthExceeded once so much of the text was seen that it cannot fit. To tokenize all of it takes a
    hundred times its memory, and of 100 MB minutes."""
    if sum(len(turn.text) for turn in turns) <= _GLANCE:
        return
    limit, num_tokens = model.spec.max_positions, 0
    for turn in turns:
        for start in range(0, len(turn.text), _GLANCE):
            num_tokens += len(model.tokenizer.encode(turn.text[start : start + _GLANCE], add_special_tokens=False))
            if num_tokens > 2 * limit:  # cuts make a few tokens more, never as many
                raise ContextLengthExceeded(limit, num_tokens)
