"""Clips as people have them, through the whole server: upload, prefill, chunk list, thumbnails and a question."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest
from clips import Clip, Clips, stretch_duration, write_clip
from live import Live, Serve
from PIL import Image

CLIPS = {
    "h264-mp4": ("mp4", {}),
    "h264-mov-with-sound": ("mov", {"audio": True}),
    "hevc-mkv": ("mkv", {"codec": "hevc"}),
    "vp9-webm": ("webm", {"codec": "vp9"}),
    "av1-webm": ("webm", {"codec": "av1"}),
    "av1-mp4": ("mp4", {"codec": "av1"}),
    "variable-frame-rate": ("mp4", {"times_s": (0.0, 0.2, 3.1, 3.15, 17.9), "duration_s": 21.0}),
    "portrait-with-rotation": ("mp4", {"rotation": 90, "width": 360, "height": 640}),
    "2-seconds": ("mp4", {"duration_s": 2.0}),
    "17-seconds": ("mp4", {"duration_s": 17.0, "fps": 5.0}),  # a last chunk of one frame
    "4k": ("mp4", {"codec": "hevc", "width": 3840, "height": 2160, "duration_s": 3.0, "fps": 2.0}),
}


def check(live: Live, client: openai.OpenAI, clip: Clip, **sampling: float) -> None:
    file = client.files.create(file=clip.path, purpose="user_data", extra_body=sampling)
    file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=250)
    assert file.status == "processed", file.status_details
    video = file.to_dict()["video"]
    assert (video["width"], video["height"]) == (clip.width, clip.height)
    assert video["duration_s"] == pytest.approx(clip.duration_s, abs=0.002)
    assert video["num_chunks"] == math.ceil(video["num_frames"] / 32) and video["progress"] == 1
    chunks = httpx.get(f"{live.url}/v1/files/{file.id}/chunks").json()
    assert [chunk["index"] for chunk in chunks] == list(range(video["num_chunks"]))
    assert chunks[0]["start_s"] == 0 and chunks[-1]["end_s"] == pytest.approx(video["duration_s"])
    assert all(one["end_s"] == two["start_s"] for one, two in pairwise(chunks))
    assert sum(chunk["tokens"]["low"] for chunk in chunks) == video["tokens"]["low"]
    for index in {0, len(chunks) - 1}:
        jpeg = httpx.get(f"{live.url}/v1/files/{file.id}/chunks/{index}/thumbnail")
        picture = Image.open(io.BytesIO(jpeg.content))
        assert picture.width / picture.height == pytest.approx(clip.width / clip.height, rel=0.02)
    content = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": "What is shown?"}]
    answer = client.chat.completions.create(
        model="x2l-tiny", messages=[{"role": "user", "content": content}], max_tokens=16
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert len(answer.to_dict()["x2l"]["scores"]) == len(chunks)
    client.files.delete(file.id)


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip(live: Live, client: openai.OpenAI, clips: Clips, name: str) -> None:
    suffix, options = CLIPS[name]
    check(live, client, clips(suffix, **options))


def test_one_hour(serve: Serve, clips: Clips) -> None:
    with serve() as live, live.client() as client:
        check(live, client, clips.hour(), fps=0.5)


def test_longer_than_the_model_can_tell_time(live: Live, client: openai.OpenAI, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", width=64, height=64, times_s=(0.0, 3000.0), duration_s=6001.0)
    with pytest.raises(openai.BadRequestError, match="6000"):
        client.files.create(file=clip.path, purpose="user_data")


def test_a_container_that_lies_about_its_length(
    live: Live, client: openai.OpenAI, clips: Clips, tmp_path: Path
) -> None:
    """It is refused, or read at its true length; it never hangs and never yields time that is not there."""
    honest = clips("mp4")
    lying = tmp_path / "lying.mp4"
    lying.write_bytes(honest.path.read_bytes())
    stretch_duration(lying, 100)
    try:
        file = client.files.create(file=lying, purpose="user_data")
    except openai.BadRequestError as error:
        assert error.code == "video_damaged"
        return
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    if file.status == "processed":
        assert file.to_dict()["video"]["duration_s"] == pytest.approx(honest.duration_s, abs=0.01)
    else:
        assert file.status_details
