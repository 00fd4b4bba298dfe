"""The pass of a language model over windows."""

from __future__ import annotations

import pytest
import torch

from compression.cache import KVCache
from server.models.lm.decoder import Window
from server.models.registry import load_model
from server.models.slices import whole
from server.models.videoxl.model import VideoXL


@pytest.fixture(scope="module")
def tiny() -> VideoXL:
    model = load_model("tiny", device="cpu", dtype="float32")
    assert isinstance(model, VideoXL)
    return model


@pytest.mark.parametrize("num_layers", [None, 1, 3])
def test_projections_alone_are_those_of_a_whole_pass(tiny: VideoXL, num_layers: int | None) -> None:
    def windows() -> list[Window]:
        generator = torch.Generator().manual_seed(3)
        size, hidden = 7, tiny.decoder.embed_tokens.weight.shape[1]
        return [
            Window(torch.randn(size, hidden, generator=generator), KVCache(tiny.no_tokens(), tiny.rope, capacity=size))
            for _ in range(2)
        ]

    with torch.inference_mode():
        _, expected = tiny.decoder(windows())
        projected = whole(tiny.decoder.slices(windows(), num_layers))
    assert len(projected) == (num_layers or tiny.spec.num_layers)
    for layer, like in zip(projected, expected, strict=False):
        assert all(torch.equal(part, other) for part, other in zip(layer, like, strict=True))
