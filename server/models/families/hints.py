"""What a folder may say of how it is served."""

from __future__ import annotations

import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from server.models.base import check_scorer_heads
from server.models.tensors import CheckpointError

_MESSAGES = {
    "extra_forbidden": "is not among what a model of type {family} may say",
    "model_type": "must be an object",
}
"""Instead of pydantic's own."""


class Hints(BaseModel):
    """Of the object ``x2l`` in a folder's ``config.json``; published ones say nothing.

    ``scorer_heads``: the (layer, head) pairs whose attention scores chunks; None takes all. The last four are those of
    :class:`server.models.families.one_pass.OnePassConfig`, where the command line says nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    frames_per_chunk: PositiveInt = 16
    scorer_heads: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] | None = Field(default=None, min_length=1)
    low_ratio: PositiveInt | None = None
    high_ratio: PositiveInt | None = None
    compressor: str | None = None
    prefill_mode: str | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """``config`` is the whole ``config.json``. Raises CheckpointError."""
        try:
            return cls.model_validate_json(json.dumps(config.get("x2l", {})))  # where arrays may be tuples
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, ("x2l", *first["loc"])))
            message = _MESSAGES.get(first["type"], first["msg"]).format(family=config.get("model_type"))
            raise CheckpointError(f"config.json: {place}: {message}") from None

    def check(self, config: Any) -> None:
        """Against the model's configuration, of transformers' own class. Raises CheckpointError."""
        depth = getattr(config.vision_config, "temporal_patch_size", 1)
        if self.frames_per_chunk % depth:
            wanted = f"the model sees {depth} frames at a time, and this is no multiple"
            raise CheckpointError(f"config.json: x2l.frames_per_chunk is {self.frames_per_chunk}: {wanted}")
        text = config.get_text_config()
        check_scorer_heads(self.scorer_heads or (), text.num_hidden_layers, text.num_attention_heads)


class PatchHints(Hints):
    """``frame_size``: the width and height in pixels that every frame of a video is resized to."""

    frame_size: tuple[PositiveInt, PositiveInt] | None = None
