"""Makes tests/data/preprocessing.npz: what transformers' own processors make of a few frames, images and prompts.

They need torchvision, which this project does not: run it where that can be imported, with the rest of the
environment, and with ``tests`` on the path::

    pip install --no-deps --target FOLDER torchvision==0.28.0
    PYTHONPATH=FOLDER:tests:. python tests/preprocessing_arrays.py

A torchvision built for CUDA does not load its operators (nms and the like) beside a PyTorch for CPUs. The processors
use none of them (they resize by torch's own interpolation), so their registration is left out.
"""

from __future__ import annotations

import sys
import types
from typing import Any

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

# ruff: noqa: E402
import numpy as np
import torch
from numpy.typing import NDArray
from tiny_transformers import (
    CLIPS,
    FRAME_TOKENS,
    PATCH,
    PICTURES,
    PREPROCESSING,
    RESOLUTIONS,
    TILE,
    byte_tokenizer,
    image,
    noise,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata


def main() -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for family, make in (("qwen2_5_vl", _qwen2_5_vl), ("qwen3_vl", _qwen3_vl), ("llava_onevision", _llava_onevision)):
        for name, array in make().items():
            arrays[f"{family}/{name}"] = array
    np.savez_compressed(PREPROCESSING, **arrays)
    print(f"{PREPROCESSING}: {PREPROCESSING.stat().st_size} bytes, {len(arrays)} arrays")


def _qwen2_5_vl() -> dict[str, NDArray[Any]]:
    least, most = (tokens * 28**2 for tokens in FRAME_TOKENS)
    size = {"shortest_edge": least, "longest_edge": most}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    small = {"patch_size": PATCH, "cap_pixels_per_frame": False}
    small_videos = Qwen2VLVideoProcessor(size=_small_size(1), **small)
    whole = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(patch_size=PATCH), byte_tokenizer(), small_videos)
    text = "<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    return _pictures(images) | _clips(lambda num_frames: videos) | _ids(whole, text)


def _qwen3_vl() -> dict[str, NDArray[Any]]:
    least, most = (tokens * 32**2 for tokens in FRAME_TOKENS)
    look = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(size={"shortest_edge": least, "longest_edge": most}, **look)

    def videos(num_frames: int) -> Any:
        """What it takes for a size is that of all frames together."""
        size = {"shortest_edge": least * num_frames, "longest_edge": most * num_frames}
        return Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False)

    small = {"patch_size": PATCH, "cap_pixels_per_frame": False}
    small_videos = Qwen3VLVideoProcessor(size=_small_size(CLIPS[0][2]), **small)
    whole = Qwen3VLProcessor(Qwen2VLImageProcessor(patch_size=PATCH), byte_tokenizer(), small_videos)
    # It puts the text around every frame itself.
    return _pictures(images) | _clips(videos) | _ids(whole, "<|video_pad|><|vision_start|><|image_pad|><|vision_end|>")


def _llava_onevision() -> dict[str, NDArray[Any]]:
    look = {"size": {"height": TILE, "width": TILE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images, videos = (
        LlavaOnevisionImageProcessor(image_grid_pinpoints=RESOLUTIONS, **look),
        LlavaOnevisionVideoProcessor(**look),
    )
    made = _clips(lambda num_frames: videos)
    for seed, (width, height) in enumerate(PICTURES):
        frame = torch.from_numpy(image(seed, width, height).pixels[0]).permute(2, 0, 1)
        for name, given in (("alone", [[frame]]), ("one-of-two", [[frame, frame]])):
            pixels = images(given, return_tensors="pt")["pixel_values"][0]
            made[f"{name}/{width}x{height}"] = _levels(pixels, look["image_mean"], look["image_std"])
    whole = LlavaOnevisionProcessor(
        images,
        byte_tokenizer(),
        videos,
        num_image_tokens=(TILE // 8) ** 2,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    return made | _ids(whole, "<|video_pad|><|image_pad|>")


def _small_size(times: int) -> dict[str, int]:
    """That of the tiny models' frames."""
    least, most = (times * tokens * (2 * PATCH) ** 2 for tokens in FRAME_TOKENS)
    return {"shortest_edge": least, "longest_edge": most}


def _pictures(processor: Any) -> dict[str, NDArray[Any]]:
    made: dict[str, NDArray[Any]] = {}
    for seed, (width, height) in enumerate(PICTURES):
        frame = torch.from_numpy(image(seed, width, height).pixels[0]).permute(2, 0, 1)
        seen = processor([frame], return_tensors="pt")
        made[f"image/{width}x{height}"] = _levels(seen["pixel_values"], processor.image_mean, processor.image_std)
        made[f"image-grid/{width}x{height}"] = seen["image_grid_thw"][0].numpy()
    return made


def _clips(processor_for: Any) -> dict[str, NDArray[Any]]:
    made: dict[str, NDArray[Any]] = {}
    for width, height, num_frames in CLIPS:
        processor = processor_for(num_frames)
        frames = torch.from_numpy(noise(num_frames, width, height).pixels).permute(0, 3, 1, 2)
        seen = processor([frames], return_tensors="pt", do_sample_frames=False)
        pixels = seen["pixel_values_videos"]
        name = f"{width}x{height}x{num_frames}"
        made[f"video/{name}"] = _levels(pixels, processor.image_mean, processor.image_std)
        made[f"normalized/{name}"] = pixels.reshape(-1)[:64].numpy()
        if "video_grid_thw" in seen:
            made[f"video-grid/{name}"] = seen["video_grid_thw"][0].numpy()
    return made


def _ids(processor: Any, text: str) -> dict[str, NDArray[Any]]:
    """The tokens of a prompt with the first video, at two frames a second, and the first image."""
    width, height, num_frames = CLIPS[0]
    frames = torch.from_numpy(noise(num_frames, width, height).pixels).permute(0, 3, 1, 2)
    frame = torch.from_numpy(image(0, *PICTURES[0]).pixels[0]).permute(2, 0, 1)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=2.0, frames_indices=list(range(num_frames)))
    seen = processor(
        text=[text],
        images=[[frame]],
        videos=[frames],
        videos_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )
    return {"ids": np.array(seen["input_ids"][0])}


def _levels(pixels: torch.Tensor, mean: Any, std: Any) -> NDArray[np.uint8]:
    """Normalized values, of channels in the third dimension from the end or of flat patches, as the bytes they were.

    Raises AssertionError if they were none.
    """
    if pixels.ndim == 2:
        shape = len(pixels), 3, -1
        return _levels(pixels.reshape(shape)[..., None], mean, std).reshape(len(pixels), -1)
    axis = (-1, 1, 1)
    exact = (pixels * torch.tensor(std).reshape(axis) + torch.tensor(mean).reshape(axis)) * 255
    rounded = exact.round()
    torch.testing.assert_close(exact, rounded, atol=1e-3, rtol=0)
    return rounded.to(torch.uint8).numpy()


if __name__ == "__main__":
    main()
