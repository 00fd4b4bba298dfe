"""Several videos, images and neither, through the stock client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
from clips import Clips
from live import MODEL, Live, Serve, ask
from PIL import Image

from server.models.tiny.make_video import make_video


@pytest.fixture(scope="module")
def other_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second synthetic mp4, of two chunks."""
    path = tmp_path_factory.mktemp("other") / "other.mp4"
    make_video(path, seed=4, chunks=2)
    return path


@pytest.fixture(scope="module")
def other_id(client: openai.OpenAI, other_video: Path) -> Iterator[str]:
    file = client.files.create(file=other_video, purpose="user_data")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    yield file.id
    client.files.delete(file.id)


def stored(file_id: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": file_id}}


def image(content: str | Image.Image = "red", kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A picture, or one of a single colour."""
    buffer = io.BytesIO()
    picture = Image.new("RGB", (64, 48), content) if isinstance(content, str) else content
    picture.save(buffer, kind)
    url = f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **options}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What code is on the red star?"}]}


def complete(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **({"max_tokens": 8} | options))


def x2l(reply: Any) -> dict[str, Any]:
    return reply.to_dict()["x2l"]


def test_two_videos_and_one_budget(client: openai.OpenAI, file_id: str, other_id: str) -> None:
    messages = [user(stored(file_id), stored(other_id))]
    reply = complete(client, messages, extra_body={"x2l": {"reload": 4}})
    found = x2l(reply)
    assert found["file_id"] == file_id
    assert found["files"] == [{"file_id": file_id, "num_chunks": 3}, {"file_id": other_id, "num_chunks": 2}]
    assert len(found["scores"]) == 5 and sum(found["scores"]) <= 1
    first = {file_id: 0, other_id: 3}
    places = [first[item["file_id"]] + item["chunk"] for item in found["evidence"]]
    assert places == sorted(range(5), key=lambda place: -found["scores"][place])[:4]
    assert [item["score"] for item in found["evidence"]] == [found["scores"][place] for place in places]
    assert reply.usage.prompt_tokens_details.cached_tokens == found["kv_tokens"]["mixed"]

    each = [x2l(complete(client, ask(one), extra_body={"x2l": {"mode": "low"}})) for one in (file_id, other_id)]
    both = x2l(complete(client, messages, extra_body={"x2l": {"mode": "low"}}))
    for level in ("low", "high"):  # the prefix stands there once
        assert 0 < sum(one["kv_tokens"][level] for one in each) - both["kv_tokens"][level] < 50
    assert both["reload_bytes"] == sum(one["reload_bytes"] for one in each)
    assert "files" not in each[0] and "file_id" not in each[0]["evidence"][0]


def test_streamed_is_the_same_as_whole(client: openai.OpenAI, file_id: str, other_id: str) -> None:
    """With the videos in different messages, an image between them, and one of them twice."""
    messages = [
        user(stored(other_id)),
        {"role": "assistant", "content": "None."},
        user(stored(file_id), image("blue"), stored(other_id)),
    ]
    whole = complete(client, messages, max_tokens=16)
    chunks = list(complete(client, messages, max_tokens=16, stream=True, stream_options={"include_usage": True}))
    *answer, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == whole.choices[0].message.content
    assert usage.usage == whole.usage
    assert {**answer[-1].to_dict()["x2l"], "timings_ms": None} == {**x2l(whole), "timings_ms": None}
    assert [file["file_id"] for file in x2l(whole)["files"]] == [other_id, file_id]


def test_a_video_twice_is_one(client: openai.OpenAI, file_id: str) -> None:
    once, twice = (complete(client, [user(*[stored(file_id)] * count)]) for count in (1, 2))
    assert "files" not in x2l(twice)
    assert {**x2l(twice), "timings_ms": None} == {**x2l(once), "timings_ms": None}
    assert twice.usage == once.usage


def test_inline_and_stored_together(client: openai.OpenAI, file_id: str, clips: Clips) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clips("mp4").path.read_bytes()).decode()
    inline = {"type": "video_url", "video_url": {"url": url}}
    again = {"type": "file", "file": {"file_data": url, "filename": "again.mp4"}}
    found = x2l(complete(client, [user(inline, stored(file_id), again)]))
    made, kept = (file["file_id"] for file in found["files"])
    assert kept == file_id != made
    assert client.files.retrieve(made).status == "processed"
    client.files.delete(made)


def test_the_videos_are_waited_for_together(live: Live, client: openai.OpenAI, video: Path, other_video: Path) -> None:
    made = [
        client.files.create(file=path, purpose="user_data", extra_body={"fps": "2"}) for path in (video, other_video)
    ]
    parts = [{"type": "file", "file": {"file_id": file.id}} for file in made]
    found = x2l(complete(client, [user(*parts)], max_tokens=2))
    assert [file["file_id"] for file in found["files"]] == [file.id for file in made]
    for file in made:
        client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        complete(client, [user(*parts)])


def test_images_with_and_without_a_video(client: openai.OpenAI, live: Live, file_id: str) -> None:
    listed = [file.id for file in client.files.list()]
    tokens = 6  # four visual ones, and a VST behind every second
    for parts in ([], [stored(file_id)]):
        plain = complete(client, [user(*parts)])
        for shown in (
            [image()],
            [image("blue", "JPEG", detail="high"), image("green", "WEBP", detail="auto")],
        ):
            reply = complete(client, [user(*parts, *shown)])
            assert reply.usage.prompt_tokens == plain.usage.prompt_tokens + len(shown) * tokens
            assert reply.usage.prompt_tokens_details == plain.usage.prompt_tokens_details
            assert ("x2l" in reply.to_dict()) == bool(parts)
    assert [file.id for file in client.files.list()] == listed


def test_the_model_reads_what_an_image_shows(client: openai.OpenAI, video: Path) -> None:
    """A code that stands in one frame of a video, from that frame alone."""
    exam = json.loads(video.with_suffix(".json").read_text())["questions"]
    code = next(one for one in exam if one["type"] == "code")
    middle_s = (code["start_s"] + code["end_s"]) / 2
    with av.open(str(video)) as container:
        frame = next(frame for frame in container.decode(video=0) if frame.time >= middle_s)
    part = image(frame.to_image(), "JPEG")
    content = [part, {"type": "text", "text": code["question"]}]
    reply = complete(client, [{"role": "user", "content": content}])
    assert reply.choices[0].message.content == code["answer"]


def test_text_alone_over_many_turns(client: openai.OpenAI) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    used = []
    for question in ("Hello", "What code is on the red star?", "Why?"):
        messages.append({"role": "user", "content": question})
        whole = complete(client, messages, seed=1, temperature=0.7)
        streamed = list(complete(client, messages, seed=1, temperature=0.7, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == whole.choices[0].message.content
        assert "x2l" not in whole.to_dict() and not any("x2l" in chunk.to_dict() for chunk in streamed)
        used.append(whole.usage.prompt_tokens)
        messages.append({"role": "assistant", "content": text})
    assert used == sorted(set(used))


def refused(live: Live, *parts: Any, **body: Any) -> tuple[int, str, str]:
    whole = {"model": MODEL, "messages": [user(*parts)], "max_tokens": 2, **body}
    reply = httpx.post(f"{live.url}/v1/chat/completions", json=whole, timeout=60)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return reply.status_code, error["param"], error["code"]


@pytest.mark.parametrize("dial", [{"chunks": [0]}, {"start_s": 1}, {"end_s": 9, "reload": 1}])
def test_dials_that_do_not_tell_which_video(live: Live, file_id: str, other_id: str, dial: dict[str, Any]) -> None:
    status, param, code = refused(live, stored(file_id), stored(other_id), x2l=dial)
    assert (status, param, code) == (400, f"x2l.{next(iter(dial))}", "ambiguous_video")


def test_too_many(live: Live, file_id: str) -> None:
    videos = [stored(f"file-{number}") for number in range(4)]
    found = refused(live, stored(file_id), *videos)
    assert found == (400, "messages[0].content[4].file.file_id", "too_many_videos")
    found = refused(live, *[image()] * 9)
    assert found == (400, "messages[0].content[8].image_url.url", "too_many_images")


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:image/png;base64,@@@", 400, "invalid_base64"),
        ("data:image/png;base64,", 400, "empty_file"),
        ("data:image/png,plain", 400, "invalid_data_url"),
        ("data:video/mp4;base64,QUJD", 400, "invalid_data_url"),
        (data_url(b"no image at all"), 400, "invalid_image"),
        (data_url(b"\x89PNG\r\n\x1a\n" + b"\0" * 50), 400, "invalid_image"),
        (data_url(b"\xff\xd8\xff\xe0" * 50, "image/jpeg"), 400, None),
        ("http://127.0.0.1:1/a.png", 400, "url_not_allowed"),
        ("https://example.com/a.png", 400, "url_not_allowed"),
        ("file:///etc/passwd", 400, "url_not_allowed"),
        ("ftp://example.com/a.png", 400, "invalid_url"),
        ("/etc/passwd", 400, "invalid_url"),
    ],
)
def test_bad_images_name_their_part(live: Live, file_id: str, url: str, status: int, code: str | None) -> None:
    found = refused(live, stored(file_id), image(), {"type": "image_url", "image_url": {"url": url}})
    assert found[:2] == (status, "messages[0].content[2].image_url.url")
    assert code in (None, found[2])


def test_a_bad_video_among_good_ones_leaves_no_file(live: Live, clips: Clips) -> None:
    good = clips("mp4", width=64, height=48, duration_s=3.0, fps=3.0).path.read_bytes()
    listed = httpx.get(f"{live.url}/v1/files").json()["data"]
    for bad in (data_url(b"no video at all", "video/mp4"), "data:video/mp4;base64,@@@", "file:///etc/passwd"):
        urls = [data_url(good, "video/mp4"), bad]
        status, param, _ = refused(live, *({"type": "video_url", "video_url": {"url": url}} for url in urls))
        assert (status, param) == (400, "messages[0].content[1].video_url.url")
        assert httpx.get(f"{live.url}/v1/files").json()["data"] == listed


def test_limits_and_local_files(serve: Serve, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "in.png")
    (tmp_path / "way out.png").symlink_to("/etc/hostname")
    limits = {"max_images": 1, "max_image_bytes": 2000, "max_image_pixels": 64 * 48, "max_videos": 1}
    with serve(allowed_local_media_path=tmp_path, **limits) as live, live.client() as client:

        def shown(url: str) -> dict[str, Any]:
            return {"type": "image_url", "image_url": {"url": url}}

        assert complete(client, [user(shown(f"file://{tmp_path}/in.png"))]).usage.prompt_tokens > 0
        assert complete(client, [user(image())]).usage.prompt_tokens > 0
        for name in ("way%20out.png", "none.png", "../../../../etc/hostname", ""):
            assert refused(live, shown(f"file://{tmp_path}/{name}"))[0] == 400
        assert refused(live, image(), image())[2] == "too_many_images"
        assert refused(live, stored("file-1"), stored("file-2"))[2] == "too_many_videos"
        large = data_url(b"x" * 2100)
        assert refused(live, shown(large))[::2] == (413, "file_too_large")
        buffer = io.BytesIO()
        Image.new("RGB", (65, 48)).save(buffer, "PNG")
        assert refused(live, shown(data_url(buffer.getvalue())))[2] == "image_too_large"
        metrics = httpx.get(f"{live.url}/metrics").text
        assert "x2l_requests_in_flight 0.0" in metrics
