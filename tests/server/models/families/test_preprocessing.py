"""Against arrays of the original processors (tests/preprocessing_arrays.py made them)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_transformers import CLIPS, FRAME_TOKENS, PICTURES, PREPROCESSING, image, noise, save_llava_onevision
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from server.models.families import llava_onevision
from server.models.families.llava_onevision import OneVisionTower
from server.models.families.one_pass import OnePassConfig
from server.models.families.patches import Patches
from server.video.frames import Frames

with np.load(PREPROCESSING) as file:
    ARRAYS = dict(file)
LEAST, MOST = FRAME_TOKENS
KINDS = {
    "qwen2_5_vl": Patches(14, 2, 2, LEAST * 28**2, MOST * 28**2, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)),
    "qwen3_vl": Patches(
        16, 2, 2, LEAST * 32**2, MOST * 32**2, tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)
    ),
}


def levels(kind: Patches, patches: torch.Tensor) -> np.ndarray:
    """Flat patches as the bytes that they were."""
    mean, std = (torch.tensor(each)[:, None] for each in (kind.mean, kind.std))
    return ((patches.reshape(len(patches), 3, -1) * std + mean) * 255).round().reshape(len(patches), -1).numpy()


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("width", "height", "num_frames"), CLIPS)
def test_a_video_is_the_video_processors(family: str, width: int, height: int, num_frames: int) -> None:
    kind, name = KINDS[family], f"{width}x{height}x{num_frames}"
    patches, grid = kind.flatten(kind.resize(noise(num_frames, width, height)))
    assert list(grid) == ARRAYS[f"{family}/video-grid/{name}"].tolist()
    close(levels(kind, patches), ARRAYS[f"{family}/video/{name}"])
    one_level = 1 / 255 / min(kind.std)
    normalized = ARRAYS[f"{family}/normalized/{name}"]
    np.testing.assert_allclose(patches.flatten()[:64].numpy(), normalized, atol=1.01 * one_level)
    assert kind.num_tokens(num_frames, width, height) == len(patches) // 4


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("seed", "size"), list(enumerate(PICTURES)))
def test_an_image_is_the_image_processors(family: str, seed: int, size: tuple[int, int]) -> None:
    kind, name = KINDS[family], f"{size[0]}x{size[1]}"
    patches, grid = kind.flatten(kind.resize(image(seed, *size)))
    assert list(grid) == ARRAYS[f"{family}/image-grid/{name}"].tolist()
    close(levels(kind, patches), ARRAYS[f"{family}/image/{name}"])


@pytest.fixture(scope="module")
def one_vision(tmp_path_factory: pytest.TempPathFactory) -> OneVisionTower:
    folder = tmp_path_factory.mktemp("llava")
    save_llava_onevision(folder)
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    model = llava_onevision.load(folder, "tiny", **place, compression=OnePassConfig(), hints=llava_onevision.HINTS())
    assert isinstance(model.vision, OneVisionTower)
    return model.vision


def test_one_visions_frames_and_tiles_are_the_processors(one_vision: OneVisionTower) -> None:
    for width, height, num_frames in CLIPS:
        pixels = one_vision.preprocess(noise(num_frames, width, height))
        close(pixels.numpy(), ARRAYS[f"llava_onevision/video/{width}x{height}x{num_frames}"][0])
    for seed, (width, height) in enumerate(PICTURES):
        for alone, name in ((True, "alone"), (False, "one-of-two")):
            tiles = one_vision.preprocess_image(image(seed, width, height), alone=alone)
            close(tiles.pixels.numpy(), ARRAYS[f"llava_onevision/{name}/{width}x{height}"])
            assert (tiles.width, tiles.height) == (width, height)


def test_a_sliver_of_an_image_takes_no_square_of_gigabytes(one_vision: OneVisionTower) -> None:
    sliver = Frames(np.full((1, 100, 20_000, 3), 200, np.uint8), np.zeros(1))
    tiles = one_vision.preprocess_image(sliver, alone=False)
    assert tiles.pixels.shape == (1, 3, 40, 40)
    assert one_vision.num_image_tokens(tiles) == 25 + 1


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal: both resize by the same function of torch's. On a processor without its vector instructions it may round
    the other way here and there."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.01
