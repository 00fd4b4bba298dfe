"""No room: a quota that is too small, a full store, a full disk for files on their way in. Nothing is half written."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask
from redis_servers import RedisServer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def upload(live: Live, data: bytes, **form: str) -> httpx.Response:
    return httpx.post(
        f"{live.url}/v1/files", files={"file": ("a.mp4", data)}, data={"purpose": "user_data"} | form, timeout=60
    )


def begin(live: Live, nbytes: int) -> httpx.Response:
    body = {"filename": "a.mp4", "purpose": "user_data", "bytes": nbytes, "mime_type": "video/mp4"}
    return httpx.post(f"{live.url}/v1/uploads", json=body)


def send(live: Live, upload_id: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/uploads/{upload_id}/parts", files={"data": data}, timeout=60)


def code(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]["code"]


@pytest.fixture
def nbytes(live: Live, file_id: str) -> int:
    """What the video takes in a store: KVs and file."""
    video = live.backend.engine.library.video(file_id, "")
    return sum(live.backend.store.nbytes(key.root) for key in (video.key, video.content))


def test_the_quota_holds_for_files_and_parts_and_spares_what_is_pinned(serve: Serve, video: Path, nbytes: int) -> None:
    data = video.read_bytes()
    other = data + b"\0\0\0\x08free"  # another content, the same video
    with serve(store_quota_bytes=nbytes + 4000) as live, live.client() as client:
        store = live.backend.store
        # The parts lie in the store while the file is made of them: they are not counted twice.
        begun = begin(live, len(data)).json()["id"]
        half = len(data) // 2
        parts = [send(live, begun, piece).json()["id"] for piece in (data[:half], data[half:])]
        assert code(begin(live, nbytes), 413) == "store_quota_exceeded"
        done = httpx.post(f"{live.url}/v1/uploads/{begun}/complete", json={"part_ids": parts}, timeout=60).json()
        file = client.files.wait_for_processing(done["file"]["id"], poll_interval=0.1)
        assert file.status == "processed"

        assert httpx.post(f"{live.url}/v1/files/{file.id}", json={"pinned": True}).json()["pinned"] is True
        before = sorted(store.keys())
        assert code(upload(live, other), 413) == "store_quota_exceeded"
        assert code(begin(live, len(other)), 413) == "store_quota_exceeded"
        begun = begin(live, 2000).json()["id"]
        assert send(live, begun, bytes(2000)).status_code == 200
        assert code(send(live, begun, bytes(2000)), 413) == "store_quota_exceeded"
        httpx.post(f"{live.url}/v1/uploads/{begun}/cancel")
        assert set(store.keys()) == {*before, f"upload/{begun}/record"}
        assert client.chat.completions.create(model=MODEL, messages=ask(file.id), max_tokens=1).choices

        assert httpx.post(f"{live.url}/v1/files/{file.id}", json={"pinned": False}).json()["pinned"] is False
        second = client.files.wait_for_processing(upload(live, other).json()["id"], poll_interval=0.1)
        assert second.status == "processed"
        lost = client.files.retrieve(file.id)
        assert lost.status == "error" and "quota" in lost.status_details
        assert store.nbytes("kv/") + store.nbytes("content/") + store.nbytes("upload/") <= nbytes + 4000


def test_replicas_keep_one_quota(serve: Serve, video: Path, nbytes: int, tmp_path: Path) -> None:
    data = [video.read_bytes() + b"\0\0\0\x08free" * copies for copies in range(4)]
    quota = 2 * nbytes + 4000
    with (
        RedisServer(tmp_path) as redis,
        serve(store=redis.url, store_quota_bytes=quota) as one,
        serve(store=redis.url, store_quota_bytes=quota) as two,
        one.client() as at_one,
        two.client() as at_two,
    ):
        pinned = at_one.files.wait_for_processing(upload(one, data[0], pinned="true").json()["id"], poll_interval=0.1)
        other = at_one.files.wait_for_processing(upload(one, data[1]).json()["id"], poll_interval=0.1)
        third = at_two.files.wait_for_processing(upload(two, data[2]).json()["id"], poll_interval=0.1)
        assert third.status == "processed"
        for client in (at_one, at_two):
            assert [file.status for file in client.files.list(order="asc")] == ["processed", "error", "processed"]
            assert "quota" in client.files.retrieve(other.id).status_details
            with pytest.raises(openai.BadRequestError, match="quota"):
                client.chat.completions.create(model=MODEL, messages=ask(other.id))
            assert client.chat.completions.create(model=MODEL, messages=ask(pinned.id), max_tokens=1).choices
        httpx.post(f"{two.url}/v1/files/{third.id}", json={"pinned": True})
        assert code(upload(one, data[3]), 413) == "store_quota_exceeded"
        store = one.backend.store
        assert store.nbytes("kv/") + store.nbytes("content/") <= quota


def test_pinning(live: Live, file_id: str, video: Path) -> None:
    url = f"{live.url}/v1/files/{file_id}"
    assert httpx.get(url).json()["pinned"] is False
    for body in ({"pinned": "yes"}, {}, {"pinned": True, "more": 1}):
        assert code(httpx.post(url, json=body), 400)
    assert code(httpx.post(f"{live.url}/v1/files/file-0", json={"pinned": True}), 404) == "file_not_found"
    assert code(upload(live, video.read_bytes(), pinned="perhaps"), 400) == "invalid_value"
    pinned = upload(live, video.read_bytes(), pinned="true").json()
    assert pinned["pinned"] is True
    httpx.delete(f"{live.url}/v1/files/{pinned['id']}")


def test_a_full_store(serve: Serve, video: Path, small_disk: Path) -> None:
    with serve(store=f"disk:{small_disk / 'store'}") as live:
        store = live.backend.store
        for index in range(16):
            store.put(f"fill/{index}", bytes(180_000))
        before = sorted(store.keys())
        begun = begin(live, video.stat().st_size).json()["id"]
        for reply in (upload(live, video.read_bytes()), send(live, begun, video.read_bytes())):
            assert code(reply, 507) == "store_full"
            assert reply.headers["x-should-retry"] == "false"
        assert sorted(store.keys()) == sorted([*before, f"upload/{begun}/record"])
        assert httpx.get(f"{live.url}/v1/files").json()["data"] == []
        for index in range(16):
            store.delete(f"fill/{index}")
        assert send(live, begun, video.read_bytes()).status_code == 200


def test_a_full_disk_for_what_is_on_its_way_in(
    serve: Serve, video: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with serve() as live:
        reply = upload(live, bytes(6_000_000))
        assert code(reply, 507) == "disk_full" and reply.headers["x-should-retry"] == "false"
        assert list(live.backend.spool.folder.glob("*.part")) == []
        assert upload(live, video.read_bytes()).status_code == 200
