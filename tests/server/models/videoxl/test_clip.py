"""Video-XL's preprocessing is that of CLIP's own image processor, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil

from server.models.videoxl.clip import ClipEncoder, normalize
from server.video.frames import Frames

SIDE = 56
CONFIG = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
    }
}


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClipEncoder(32, CONFIG).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(40, 70), (71, 40), (56, 56), (57, 100), (300, 200), (5, 9)])
def test_preprocessing_is_the_image_processors(encoder: ClipEncoder, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"]
    ours = encoder.preprocess(Frames(pixels, np.arange(5.0)))
    assert ours.dtype == torch.uint8 and ours.is_contiguous()
    assert torch.equal(normalize(ours), expected)
    assert torch.equal(encoder(ours, np.arange(5.0)), encoder(expected, np.arange(5.0)))
