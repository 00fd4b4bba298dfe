from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_transformers import noise, save_llava_onevision
from transformers import SiglipImageProcessorPil
from transformers.image_utils import PILImageResampling

from server.models.families.llava_onevision import HINTS, load
from server.models.families.one_pass import OnePassConfig, OnePassModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnePassModel:
    folder = tmp_path_factory.mktemp("llava")
    save_llava_onevision(folder)
    place = {"device": torch.device("cpu"), "dtype": torch.float32, "hints": HINTS()}
    return load(Path(folder), "tiny-llava", **place, compression=OnePassConfig())


@pytest.mark.parametrize(("width", "height"), [(100, 60), (40, 90), (333, 77)])
def test_preprocessing_is_the_image_processors(model: OnePassModel, width: int, height: int) -> None:
    """The video processor's steps: a square without regard to the aspect ratio, bicubic. PIL rounds in between."""
    frames = noise(3, width, height)
    size = {"height": 40, "width": 40}
    processor = SiglipImageProcessorPil(size=size, resample=PILImageResampling.BICUBIC)
    expected = processor(images=list(frames.pixels), return_tensors="pt")["pixel_values"]
    pixels = model.preprocess(frames)
    assert pixels.dtype == torch.uint8
    levels = (pixels.float() - (expected * 0.5 + 0.5) * 255).abs()
    assert levels.max() < 12.01 and levels.mean() < 0.1
    features = model.encode(pixels, frames.times_s).features
    assert len(features) == model.num_visual_tokens(3, width, height) == 27
