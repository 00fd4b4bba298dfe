"""Folders as users find them, good ones and bad ones, of every family."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_transformers import SAVE, edit_json
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.utils import logging
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from server.models.base import VideoModel
from server.models.registry import load_model
from server.models.tensors import CheckpointError
from server.video.reader import Sampling

ASSET = Path(__file__).parents[3] / "assets" / "tiny-qwen2_5-vl"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=SAVE)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path) -> VideoModel:
    return load_model(str(folder), device="cpu")


def refused(folder: Path, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def change_text(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=config["text_config"] | values)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: cut(folder / WEIGHTS, 100), r"model\.safetensors cannot be read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 4), r"model\.safetensors cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"holds no model\.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "is no index of shards"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json, nor vocab\.json and merges\.txt"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is no JSON"),
        (lambda folder: change_text(folder, hidden_size="a"), "cannot be loaded"),
        (lambda folder: change_text(folder, num_attention_heads=0), "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "no JSON object"),
    ],
)
def test_damaged_files_are_named(folder: Path, spoil: Callable[[Path], object], named: str) -> None:
    spoil(folder)
    refused(folder, named)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_quantized_checkpoints_are_refused_by_name(folder: Path, method: str) -> None:
    (folder / WEIGHTS).unlink()  # before weights are looked for
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, f"^quantized with {method}: such checkpoints are not supported$")


def save_changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        lost = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
        weights["something.else"] = weights.pop(lost)
        (flat,) = (name for name in weights if name.endswith("layers.2.mlp.down_proj.weight"))
        weights[flat] = weights[flat].flatten()

    save_changed(folder, spoil)
    refused(
        folder,
        r"^missing tensors: \S*layers\.1\.mlp\.up_proj\.weight; unexpected tensors: something\.else; "
        r"tensors of another shape: \S*layers\.2\.mlp\.down_proj\.weight \[6144\] instead of \[64, 96\]$",
    )


def test_many_names_are_counted(folder: Path) -> None:
    save_changed(folder, lambda weights: [weights.pop(name) for name in list(weights) if "proj" in name])
    refused(folder, r"^missing tensors: [^,]+(, [^,]+){9} and \d\d more$")


def test_nothing_is_read_before_all_is_known_to_fit(folder: Path) -> None:
    """A tensor of gigabytes, in a file that takes no room: whoever reads it takes twice as much memory."""
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    del weights[name]
    save_file(weights, folder / "small.safetensors", {"format": "pt"})
    (folder / WEIGHTS).unlink()
    nbytes, shape = 2 << 30, [1 << 24, 64]
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    with (folder / "large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + nbytes)
    places = {name: "large.safetensors"} | dict.fromkeys(weights, "small.safetensors")
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map=places)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, r"^tensors of another shape: lm_head\.weight \[16777216, 64\] instead of \[288, 64\]$")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < nbytes / 4


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folder)
    save_changed(folder, dict.popitem)
    refused(folder, "^missing tensors: ")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_head_that_is_tied_to_the_embeddings_is_not_missed() -> None:
    assert "lm_head.weight" not in load_file(ASSET / WEIGHTS)
    assert load(ASSET).spec.fps == 1.0, "what benchmarks were run at"


@pytest.mark.parametrize(
    ("files", "fps"),
    [
        ({}, 1.0),
        ({"preprocessor_config.json": {"fps": 2}}, 2.0),
        ({"video_preprocessor_config.json": {"fps": 0.5}, "preprocessor_config.json": {"fps": 3}}, 0.5),
        ({"processor_config.json": {"video_processor": {"fps": 4.0, "min_frames": 4, "max_frames": 8}}}, 4.0),
        *(({"preprocessor_config.json": {"fps": bad}}, 1.0) for bad in (None, 0, -1, "2", True, float("inf"), [2])),
    ],
)
def test_the_folder_says_how_often_a_video_is_looked_at(folder: Path, files: dict[str, Any], fps: float) -> None:
    for name, content in files.items():
        edit_json(folder / name, **content)
    assert load(folder).spec.fps == fps


@pytest.mark.parametrize("fps", [0.5, 1, 2])
@pytest.mark.parametrize("duration_s", [24, 600, 3600])
def test_videos_are_looked_at_when_the_original_processors_do(folder: Path, fps: float, duration_s: int) -> None:
    """But for their limits of the number of frames. They spread their frames evenly over the whole video, Qwen3-VL's
    as far as its last frame, so towards the end these are up to an interval later."""
    edit_json(folder / "video_preprocessor_config.json", fps=fps)
    num_frames, interval_s = Sampling(load(folder).spec.fps).grid(duration_s)
    video = VideoMetadata(total_num_frames=25 * duration_s, fps=25.0, duration=duration_s)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    if family == "qwen3_vl":
        unlimited = SimpleNamespace(min_frames=1, max_frames=1 << 30)
        indices = Qwen3VLVideoProcessor.sample_frames(unlimited, video, fps=fps)
    elif family == "llava_onevision":
        indices = default_sample_indices_fn(video, fps=fps)
    else:  # Qwen2VLVideoProcessor.sample_frames of transformers 5.23, which needs torchvision to be imported
        most = video.total_num_frames // 2 * 2
        number = int(min(video.total_num_frames / video.fps * fps, most)) // 2 * 2
        indices = np.arange(0, video.total_num_frames, video.total_num_frames / number).astype(int)
    assert len(indices) == num_frames
    late_s = np.array(indices) / video.fps - np.arange(num_frames) * interval_s
    assert np.abs(late_s).max() < (1 if family == "qwen3_vl" else 0.5) * interval_s
