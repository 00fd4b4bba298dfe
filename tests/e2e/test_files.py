from __future__ import annotations

import asyncio
import io
import itertools
import json
from pathlib import Path

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask
from PIL import Image


def test_an_upload_becomes_a_processed_file(client: openai.OpenAI, live: Live, video: Path) -> None:
    file = client.files.create(file=video, purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.object, file.filename, file.purpose) == ("file", "made.mp4", "vision")
    assert file.bytes == video.stat().st_size
    assert file.expires_at == file.created_at + 3600
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert (file.status, file.status_details) == ("processed", None)
    facts = file.to_dict()["video"]
    assert facts["duration_s"] == pytest.approx(96, abs=0.2)
    assert (facts["num_chunks"], facts["chunks_done"], facts["progress"]) == (3, 3, 1.0)
    assert facts["tokens"]["visual"] > facts["tokens"]["low"] > facts["tokens"]["high"] > 0
    assert facts["bytes"]["low"] > facts["bytes"]["high"] > 0
    spec = live.backend.model.spec
    assert facts["tokens"]["visual"] == facts["num_frames"] * spec.tokens_per_frame
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_sampling_can_be_chosen(client: openai.OpenAI, video: Path) -> None:
    file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "0.5", "max_frames": "10"})
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert file.to_dict()["video"]["num_frames"] == 10
    client.files.delete(file.id)


def test_events_follow_the_prefill_to_its_end(client: openai.OpenAI, live: Live, video: Path) -> None:
    file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "1.5"})
    with httpx.stream("GET", f"{live.url}/v1/files/{file.id}/events", timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        states = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    progress = [(state["video"] or {"progress": 0.0})["progress"] for state in states]
    assert progress == sorted(progress)
    assert states[-1]["status"] == "processed"
    assert states[-1] == json.loads(json.dumps(client.files.retrieve(file.id).to_dict()))
    client.files.delete(file.id)


def test_list_pages_and_filters(client: openai.OpenAI, video: Path, file_id: str) -> None:
    more = [client.files.create(file=video, purpose="vision").id for _ in range(2)]
    listed = [file.id for file in client.files.list()]
    assert listed[:2] == more[::-1] and file_id in listed[2:]
    assert [file.id for file in client.files.list(limit=1)] == listed  # the SDK walks the pages
    assert [file.id for file in client.files.list(order="asc")] == listed[::-1]
    vision = [file.id for file in client.files.list(purpose="vision")]
    assert vision[:2] == more[::-1] and file_id not in vision
    for extra in more:
        client.files.delete(extra)


def test_chunks_and_thumbnails(live: Live, file_id: str) -> None:
    chunks = httpx.get(f"{live.url}/v1/files/{file_id}/chunks").json()
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2]
    assert chunks[0]["start_s"] == 0
    assert all(one["end_s"] == two["start_s"] for one, two in itertools.pairwise(chunks))
    assert chunks[-1]["end_s"] == pytest.approx(96, abs=0.2)
    assert all(chunk["tokens"]["low"] > chunk["tokens"]["high"] for chunk in chunks)
    for index in range(3):
        reply = httpx.get(f"{live.url}/v1/files/{file_id}/chunks/{index}/thumbnail")
        assert reply.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(reply.content)) as picture:
            assert picture.format == "JPEG"
    assert httpx.get(f"{live.url}/v1/files/{file_id}/chunks/3/thumbnail").status_code == 404
    assert httpx.get(f"{live.url}/v1/files/{file_id}/chunks/-1/thumbnail").status_code == 404


def test_content_comes_back_whole_and_in_part(client: openai.OpenAI, live: Live, video: Path, file_id: str) -> None:
    data = video.read_bytes()
    assert client.files.content(file_id).read() == data
    url = f"{live.url}/v1/files/{file_id}/content"
    for header, expected in (
        ("bytes=0-9", data[:10]),
        ("bytes=5000-", data[5000:]),
        ("bytes=-7", data[-7:]),
        (f"bytes=3-{len(data) + 5}", data[3:]),
    ):
        reply = httpx.get(url, headers={"range": header})
        assert (reply.status_code, reply.content) == (206, expected)
    assert httpx.get(url, headers={"range": f"bytes={len(data)}-"}).status_code == 416
    assert "attachment" in reply.headers["content-disposition"]


def test_content_that_is_not_kept(serve: Serve, video: Path) -> None:
    with serve(keep_video=False) as live, live.client() as client:
        file = client.files.create(file=video, purpose="user_data")
        assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
        with pytest.raises(openai.NotFoundError) as refused:
            client.files.content(file.id)
        assert refused.value.code == "content_not_kept"


def test_relevance_scores_every_chunk(live: Live, file_id: str) -> None:
    reply = httpx.post(f"{live.url}/v1/files/{file_id}/relevance", json={"question": "Where is the star?"}).json()
    assert reply["file_id"] == file_id
    assert len(reply["scores"]) == 3
    best_first = sorted(range(3), key=lambda index: -reply["scores"][index])
    assert reply["selection"] == best_first[: len(reply["selection"])]
    assert 1 <= len(reply["selection"]) <= 3


def test_a_selection_can_be_previewed(live: Live, client: openai.OpenAI, file_id: str) -> None:
    def preview(dials: object) -> httpx.Response:
        body = {"question": "What code is on the red star?", "x2l": dials}
        return httpx.post(f"{live.url}/v1/files/{file_id}/relevance", json=body)

    most = client.chat.completions.create(
        model=MODEL, messages=ask(file_id), max_tokens=1, extra_body={"x2l": {"reload": 2}}
    ).x2l["kv_tokens"]["mixed"]
    for dials, chosen in (
        (None, 3),
        ({}, 3),
        ({"reload": 0}, 0),
        ({"reload": 1}, 1),
        ({"budget_tokens": most}, 2),
        ({"mode": "low"}, 3),
        ({"mode": "high"}, 0),
        ({"chunks": [2, 0]}, {0, 2}),
        ({"start_s": 40, "end_s": 60}, {1}),
    ):
        reply = preview(dials).json()
        assert len(reply["scores"]) == 3 and set(reply) == {"file_id", "scores", "selection"}
        if dials:
            answer = client.chat.completions.create(
                model=MODEL, messages=ask(file_id), max_tokens=1, extra_body={"x2l": dials}
            )
            assert [item["chunk"] for item in answer.x2l["evidence"]] == reply["selection"]
        assert chosen in (len(reply["selection"]), set(reply["selection"]))
    for dials, param in (
        ({"reload": 1, "mode": "low"}, "x2l"),
        ({"chunks": [7]}, "x2l.chunks"),
        ({"budget_tokens": 1}, "x2l.budget_tokens"),
        ({"relaod": 1}, "x2l.relaod"),
        ({"start_s": 60, "end_s": 40}, "x2l.start_s"),
    ):
        refused = preview(dials)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_deleting_while_prefilling_leaves_nothing(live: Live, client: openai.OpenAI, video: Path) -> None:
    file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "7"})
    assert client.files.delete(file.id).deleted
    assert httpx.get(f"{live.url}/v1/files/{file.id}").status_code == 404
    assert httpx.delete(f"{live.url}/v1/files/{file.id}").status_code == 404


def test_a_restart_finds_files_without_prefilling(serve: Serve, video: Path, tmp_path: Path) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with serve(store=store) as live, live.client() as client:
        file = client.files.create(file=video, purpose="user_data")
        before = client.files.wait_for_processing(file.id, poll_interval=0.1)
    with serve(store=store) as live, live.client() as client:
        assert client.files.retrieve(file.id) == before


def test_other_settings_are_told_and_leave_nothing_behind(serve: Serve, video: Path, tmp_path: Path) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with serve(store=store) as live, live.client() as client:
        first, second = (client.files.create(file=video, purpose="user_data") for _ in range(2))
        before = client.files.wait_for_processing(first.id, poll_interval=0.1).to_dict()["video"]
        client.files.wait_for_processing(second.id, poll_interval=0.1)
    with serve(store=store, kv_dtype="int8") as live, live.client() as client:
        file = client.files.wait_for_processing(second.id, poll_interval=0.1)
        assert file.status == "processed" and "next question has it prefilled again" in (file.status_details or "")
        assert file.to_dict()["video"] == before | {"bytes": {"low": 0, "high": 0}}
        client.chat.completions.create(model=MODEL, messages=ask(first.id), max_tokens=4)
        file = client.files.retrieve(second.id)
        assert file.status_details is None and 0 < file.to_dict()["video"]["bytes"]["low"] < before["bytes"]["low"]
        assert all(client.files.delete(file.id).deleted for file in (first, second))
    assert not [path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()]


def test_videos_that_the_device_has_no_room_for(serve: Serve, video: Path, tmp_path: Path) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with serve(store=store) as live, live.client() as client:
        files = [client.files.create(file=video, purpose="user_data", extra_body={"fps": fps}) for fps in (1, 2)]
        facts = [client.files.wait_for_processing(file.id, poll_interval=0.1).to_dict()["video"] for file in files]
    together = sum(one["bytes"]["high"] for one in facts)
    with serve(store=store, gpu_kv_budget=together) as live, live.client() as client:
        with pytest.raises(openai.BadRequestError, match="--gpu-kv-budget") as refused:
            messages = ask(files[0].id)
            messages[0]["content"] += ask(files[1].id)[0]["content"]
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
        assert (refused.value.code, refused.value.param) == ("video_too_large", "messages")
        with pytest.raises(openai.BadRequestError, match="--gpu-kv-budget") as refused:
            client.files.create(file=video, purpose="user_data", extra_body={"fps": 4})
        assert (refused.value.code, refused.value.param) == ("video_too_large", "file")
        assert len(list(client.files.list())) == 2


def test_async_client(live: Live, video: Path) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            file = await client.files.create(file=video, purpose="user_data")
            file = await client.files.wait_for_processing(file.id, poll_interval=0.1)
            assert file.status == "processed"
            assert file.id in [known.id async for known in await client.files.list()]
            await client.files.delete(file.id)

    asyncio.run(run())
