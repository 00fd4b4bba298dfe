"""Slices give what the whole gives; and on a GPU nobody waits between them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from server.models.registry import load_model
from server.models.slices import through, whole
from server.models.tiny.encoder import TinyEncoder

LAYERS = 11


@pytest.fixture
def tower() -> Any:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModel(config).eval()
    return getattr(model, "vision_model", model)


@torch.inference_mode()
def test_a_tower_of_transformers_in_slices(tower: Any) -> None:
    """Bit for bit, with the states of all layers; while it pauses, others may use it."""
    pixels, others = torch.rand(2, 3, 3, 28, 28)

    def see(what: torch.Tensor) -> list[torch.Tensor]:
        seen = tower(what, output_hidden_states=True)
        return [seen.last_hidden_state, seen.pooler_output, *seen.hidden_states]

    expected, expected_of_others = see(pixels), see(others)
    slices, num_pauses = through(lambda: see(pixels), tower.encoder.layers), 0
    while True:
        try:
            next(slices)
        except StopIteration as end:
            found = end.value
            break
        num_pauses += 1
        assert all(map(torch.equal, see(others), expected_of_others))
    assert num_pauses == math.ceil(LAYERS / 2)
    assert len(found) == LAYERS + 3 and all(map(torch.equal, found, expected))


@torch.inference_mode()
def test_a_tower_that_fails_or_is_given_up_is_as_before(tower: Any) -> None:
    pixels = torch.rand(3, 3, 28, 28)
    expected = tower(pixels).last_hidden_state
    with pytest.raises(RuntimeError):
        whole(through(lambda: tower(pixels[:, :2]), tower.encoder.layers))
    slices = through(lambda: tower(pixels), tower.encoder.layers)
    next(slices)
    slices.close()
    assert torch.equal(tower(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 9, 32])
@torch.inference_mode()
def test_the_bundled_tower_in_slices(num_frames: int) -> None:
    encoder = TinyEncoder(64).eval()
    pixels = torch.randint(0, 256, (num_frames, 3, 64, 96), dtype=torch.uint8)
    seconds = torch.arange(num_frames)
    expected = encoder.tokens(encoder.cells(pixels / 255), seconds).flatten(0, 1)
    torch.testing.assert_close(encoder(pixels, np.arange(num_frames) * 1.0), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_prefill_never_waits_for_the_gpu() -> None:
    model = load_model("tiny", device="cuda")
    pixels = torch.randint(0, 256, (32, 3, 64, 96), dtype=torch.uint8, device="cuda")
    made = []
    for attempt in range(2):  # the first makes what is kept, and may wait
        prefill = model.prefill()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            for chunk in range(3):
                features = model.encode(pixels, np.arange(32) + 32.0 * chunk)
                made.append(prefill.append(features, last=chunk == 2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(made[:3], made[3:], strict=True):
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
