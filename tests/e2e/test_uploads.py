"""Files in parts: by the stock SDK, in parallel, after a cut connection, after a restart."""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask
from redis_servers import RedisServer
from rich.console import Console

from server.cli import files as cli_files
from server.client import connect
from server.engine import uploads as engine_uploads
from server.engine.uploads import Uploads


@pytest.fixture
def parts(video: Path) -> list[bytes]:
    data = video.read_bytes()
    size = len(data) // 5 + 1
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.fixture(autouse=True)
def nothing_is_left(live: Live) -> Iterator[None]:
    """Whatever happens to an upload, neither its parts nor a temporary file stay."""
    yield
    Uploads(live.backend.store, live.backend.engine.library).sweep()
    assert [blob for blob in live.backend.store.keys("upload/") if "/part/" in blob] == []
    assert [path.name for path in live.backend.spool.folder.iterdir() if path.suffix == ".part"] == []


def create(live: Live, nbytes: int, **fields: Any) -> httpx.Response:
    body = {"filename": "a.mp4", "purpose": "user_data", "bytes": nbytes, "mime_type": "video/mp4"} | fields
    return httpx.post(f"{live.url}/v1/uploads", json=body, timeout=60)


def send(live: Live, upload_id: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/uploads/{upload_id}/parts", files={"data": data}, timeout=60)


def finish(live: Live, upload_id: str, part_ids: list[str], **fields: Any) -> httpx.Response:
    url = f"{live.url}/v1/uploads/{upload_id}/complete"
    return httpx.post(url, json={"part_ids": part_ids} | fields, timeout=60)


def cancel(live: Live, upload_id: str) -> None:
    assert httpx.post(f"{live.url}/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    return error


def test_the_sdk_uploads_in_parts(client: openai.OpenAI, live: Live, video: Path) -> None:
    md5 = hashlib.md5(video.read_bytes()).hexdigest()
    part_size = video.stat().st_size // 3 + 1
    upload = client.uploads.upload_file_chunked(
        file=video, mime_type="video/mp4", purpose="user_data", part_size=part_size, md5=md5
    )
    assert (upload.object, upload.status, upload.bytes) == ("upload", "completed", video.stat().st_size)
    assert upload.expires_at == upload.created_at + 3600
    assert (upload.file.object, upload.file.filename, upload.file.bytes) == ("file", video.name, upload.bytes)
    file = client.files.wait_for_processing(upload.file.id, poll_interval=0.1)
    assert file.status == "processed" and client.files.content(file.id).read() == video.read_bytes()
    assert client.chat.completions.create(model=MODEL, messages=ask(file.id), max_tokens=1).choices
    shown = httpx.get(f"{live.url}/v1/uploads/{upload.id}").json()
    assert shown["parts"] == [] and shown["file"]["status"] == "processed"
    client.files.delete(file.id)
    assert httpx.get(f"{live.url}/v1/uploads/{upload.id}").json()["file"] is None


def test_the_async_sdk_uploads_bytes_in_parts(live: Live, video: Path) -> None:
    data = video.read_bytes()

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            upload = await client.uploads.upload_file_chunked(
                file=data, filename="b.mp4", bytes=len(data), mime_type="video/mp4", purpose="vision", part_size=99_999
            )
            assert upload.status == "completed" and (upload.file.filename, upload.file.purpose) == ("b.mp4", "vision")
            await client.files.delete(upload.file.id)

    asyncio.run(run())


def test_what_was_asked_for_at_the_beginning_holds_for_the_file(live: Live, video: Path) -> None:
    data = video.read_bytes()
    after = {"anchor": "created_at", "seconds": 7200}
    upload = create(live, len(data), fps=0.5, max_frames=10, expires_after=after, pinned=True).json()
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    part = send(live, upload["id"], data).json()
    assert (part["object"], part["upload_id"], part["bytes"]) == ("upload.part", upload["id"], len(data))
    file = finish(live, upload["id"], [part["id"]]).json()["file"]
    assert file["pinned"] and file["expires_at"] == file["created_at"] + 7200
    with live.client() as client:
        processed = client.files.wait_for_processing(file["id"], poll_interval=0.1).to_dict()
        assert processed["video"]["num_frames"] == 10
        client.files.delete(file["id"])


def test_x2l_sends_a_large_file_in_parts(live: Live, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_files, "IN_PARTS_ABOVE_NBYTES", 0)
    monkeypatch.setattr(cli_files, "PART_NBYTES", 100_000)
    fields = {"max_frames": 8, "expires_after": {"anchor": "created_at", "seconds": 7200}}
    with connect(live.url, "") as client:
        quiet = Console(quiet=True)
        file = cli_files.wait_until_ready(client, cli_files.send_file(client, video, fields, quiet)["id"], quiet)
        assert (file["status"], file["bytes"], file["video"]["num_frames"]) == ("processed", video.stat().st_size, 8)
        assert file["expires_at"] == file["created_at"] + 7200
        client.delete(f"/v1/files/{file['id']}")


def test_parts_in_parallel_and_in_any_order(live: Live, video: Path, parts: list[bytes]) -> None:
    upload = create(live, video.stat().st_size).json()
    with ThreadPoolExecutor(3) as threads:
        sent = list(threads.map(lambda data: send(live, upload["id"], data).json()["id"], reversed(parts)))
    done = finish(live, upload["id"], sent[::-1], md5=hashlib.md5(video.read_bytes()).hexdigest().upper()).json()
    assert done["status"] == "completed"
    assert httpx.get(f"{live.url}/v1/files/{done['file']['id']}/content").content == video.read_bytes()
    httpx.delete(f"{live.url}/v1/files/{done['file']['id']}")


def test_a_cut_connection_leaves_nothing_and_the_client_goes_on(live: Live, video: Path, parts: list[bytes]) -> None:
    upload = create(live, video.stat().st_size).json()
    state = f"{live.url}/v1/uploads/{upload['id']}"
    first = send(live, upload["id"], parts[0]).json()
    body = b'--b\r\ncontent-disposition: form-data; name="data"; filename="x"\r\n\r\n' + parts[1] + b"\r\n--b--\r\n"
    head = f"POST /v1/uploads/{upload['id']}/parts HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port)) as wire:
        wire.sendall(head.encode() + body[: len(body) // 2])
        time.sleep(0.1)
        assert list(live.backend.spool.folder.glob("*.part"))
    for _ in range(500):
        if not list(live.backend.spool.folder.glob("*.part")):
            break
        time.sleep(0.01)
    arrived = httpx.get(state).json()
    assert [part["id"] for part in arrived["parts"]] == [first["id"]] and arrived["status"] == "pending"
    have = sum(part["bytes"] for part in arrived["parts"])
    rest = video.read_bytes()[have:]
    again = send(live, upload["id"], rest).json()
    assert [part["bytes"] for part in httpx.get(state).json()["parts"]] == [have, len(rest)]
    done = finish(live, upload["id"], [first["id"], again["id"]]).json()
    assert done["status"] == "completed"
    httpx.delete(f"{live.url}/v1/files/{done['file']['id']}")


def test_a_restart_goes_on(serve: Serve, video: Path, parts: list[bytes], tmp_path: Path) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with serve(store=store) as before:
        upload = create(before, video.stat().st_size).json()
        sent = [send(before, upload["id"], data).json()["id"] for data in parts[:3]]
    with serve(store=store) as after:
        shown = httpx.get(f"{after.url}/v1/uploads/{upload['id']}").json()
        assert [part["id"] for part in shown["parts"]] == sent
        sent += [send(after, upload["id"], data).json()["id"] for data in parts[3:]]
        assert finish(after, upload["id"], sent).json()["file"]["bytes"] == video.stat().st_size


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": -1}, 400, "bytes"),
        ({"bytes": "12"}, 400, "bytes"),
        ({"bytes": 1.5}, 400, "bytes"),
        ({"bytes": True}, 400, "bytes"),
        ({"bytes": 6_000_001}, 413, "bytes"),
        ({"filename": ""}, 400, "filename"),
        ({"filename": None}, 400, "filename"),
        ({"purpose": "fine-tune"}, 400, "purpose"),
        ({"mime_type": "text/plain"}, 400, "mime_type"),
        ({"mime_type": 7}, 400, "mime_type"),
        ({"expires_after": {"anchor": "now", "seconds": 60}}, 400, "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at"}}, 400, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at", "seconds": 0}}, 400, "expires_after.seconds"),
        ({"fps": 1000}, 400, "fps"),
        ({"max_frames": 0}, 400, "max_frames"),
        ({"pinned": "yes"}, 400, "pinned"),
    ],
)
def test_what_cannot_begin(live: Live, fields: dict[str, Any], status: int, param: str) -> None:
    assert (
        refusal(create(live, **({"nbytes": 10} | {"nbytes": fields.pop("bytes", 10)}), **fields), status)["param"]
        == param
    )


def test_parts_that_do_not_make_the_file(live: Live, video: Path, parts: list[bytes]) -> None:
    upload = create(live, video.stat().st_size).json()["id"]
    sent = [send(live, upload, data).json()["id"] for data in parts]
    other = create(live, 3).json()["id"]
    foreign = send(live, other, b"abc").json()["id"]
    for part_ids, code in (
        (sent[:-1], "bytes_mismatch"),
        ([*sent[:-1], sent[0]], "duplicate_part"),
        ([*sent[:-1], foreign], "part_not_found"),
        ([*sent[:-1], "part_0"], "part_not_found"),
        ([*sent[:-1], "../../record"], "part_not_found"),
    ):
        error = refusal(finish(live, upload, part_ids), 400)
        assert (error["code"], error["param"]) == (code, "part_ids")
    assert refusal(finish(live, upload, []), 400)["param"] == "part_ids"
    assert refusal(finish(live, upload, sent, md5="0" * 32), 400)["code"] == "md5_mismatch"
    assert refusal(finish(live, upload, sent, md5="not hex"), 400)["param"] == "md5"
    assert refusal(finish(live, upload, sent[::-1]), 400)["param"] == "file"  # all bytes, in an order that is no video
    done = finish(live, upload, sent)  # nothing of this has spoilt the upload
    assert done.status_code == 200
    httpx.delete(f"{live.url}/v1/files/{done.json()['file']['id']}")
    cancel(live, other)


def test_parts_that_are_none(live: Live) -> None:
    upload = create(live, 10).json()["id"]
    url = f"{live.url}/v1/uploads/{upload}/parts"
    assert refusal(send(live, upload, b""), 400)["param"] == "data"
    assert refusal(httpx.post(url, files={"file": b"x"}), 400)["param"] == "file"
    assert refusal(httpx.post(url, files={"data": b"x"}, data={"more": "1"}), 400)["param"] == "more"
    refusal(httpx.post(url, json={"data": "x"}), 400)
    large = io.BytesIO(bytes(64 * 2**20 + 1))
    assert refusal(httpx.post(url, files={"data": large}, timeout=60), 413)["param"] == "data"
    assert httpx.get(f"{live.url}/v1/uploads/{upload}").json()["parts"] == []
    cancel(live, upload)


def test_a_client_that_sends_the_same_part_for_ever_is_stopped(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_uploads, "MAX_PART_NBYTES", 500)
    upload = create(live, 1000).json()["id"]
    assert [send(live, upload, bytes(1000)).status_code for _ in range(2)] == [200, 400]
    cancel(live, upload)


def test_ended_uploads_take_nothing(live: Live, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = video.read_bytes()
    cancelled, completed, expired = (create(live, len(data)).json()["id"] for _ in range(3))
    ids = {upload: send(live, upload, data).json()["id"] for upload in (cancelled, completed, expired)}
    cancel(live, cancelled)
    file = finish(live, completed, [ids[completed]]).json()["file"]
    store = live.backend.store
    uploads = Uploads(store, live.backend.engine.library)
    uploads._save(replace(uploads.get(expired, ""), expires_at=int(time.time())))
    for upload, status in ((cancelled, "cancelled"), (completed, "completed"), (expired, "expired")):
        assert httpx.get(f"{live.url}/v1/uploads/{upload}").json()["status"] == status
        for reply in (
            send(live, upload, b"x"),
            finish(live, upload, [ids[upload]]),
            httpx.post(f"{live.url}/v1/uploads/{upload}/cancel"),
        ):
            assert refusal(reply, 400)["code"] == f"upload_{status}"
    assert store.nbytes(f"upload/{expired}/part/")
    uploads.sweep()
    assert not store.nbytes(f"upload/{expired}/part/")
    monkeypatch.setattr(engine_uploads, "_REMEMBERED_S", -3600)
    uploads.sweep()
    assert list(store.keys("upload/")) == []
    assert refusal(httpx.get(f"{live.url}/v1/uploads/{expired}"), 404)["code"] == "upload_not_found"
    httpx.delete(f"{live.url}/v1/files/{file['id']}")


def test_unknown_uploads(live: Live) -> None:
    for upload in ("upload_" + "0" * 24, "upload_x", "..%2f..", "file-1"):
        for reply in (
            httpx.get(f"{live.url}/v1/uploads/{upload}"),
            send(live, upload, b"x" * 3_000_000),
            finish(live, upload, ["part_0"]),
            httpx.post(f"{live.url}/v1/uploads/{upload}/cancel"),
        ):
            refusal(reply, 404)


def test_an_upload_that_is_being_completed_is_left_alone(live: Live) -> None:
    upload = create(live, 10).json()["id"]
    store = live.backend.store
    assert store.acquire_lock(f"upload/{upload}", "another replica", 60)
    reply = httpx.post(f"{live.url}/v1/uploads/{upload}/cancel")
    assert refusal(reply, 409)["code"] == "upload_busy" and "retry-after" in reply.headers
    store.release_lock(f"upload/{upload}", "another replica")
    cancel(live, upload)


def test_a_part_that_the_store_has_lost(live: Live) -> None:
    upload = create(live, 6).json()["id"]
    sent = [send(live, upload, data).json()["id"] for data in (b"abc", b"def")]
    store = live.backend.store
    store.delete(f"upload/{upload}/part/{sent[0]}/part/00000")
    assert refusal(finish(live, upload, sent), 400)["code"] == "part_damaged"
    store.delete(f"upload/{upload}/part/{sent[0]}/manifest")
    assert refusal(finish(live, upload, sent), 400)["code"] == "part_not_found"
    cancel(live, upload)


def test_one_key_never_sees_anothers_uploads(serve: Serve) -> None:
    with serve(api_key=("first", "second")) as live, live.client("first") as first, live.client("second") as second:
        upload = first.uploads.create(bytes=3, filename="a.mp4", mime_type="video/mp4", purpose="user_data")
        part = first.uploads.parts.create(upload.id, data=b"abc")
        for call in (
            lambda: second.uploads.parts.create(upload.id, data=b"abc"),
            lambda: second.uploads.complete(upload.id, part_ids=[part.id]),
            lambda: second.uploads.cancel(upload.id),
            lambda: second.get(f"/uploads/{upload.id}", cast_to=object),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.AuthenticationError), live.client("third") as third:
            third.uploads.cancel(upload.id)
        assert first.uploads.cancel(upload.id).status == "cancelled"


@pytest.fixture
def replicas(serve: Serve, tmp_path: Path) -> Iterator[tuple[Live, Live]]:
    """Two servers that share a Redis."""
    with RedisServer(tmp_path) as redis, serve(store=redis.url) as one, serve(store=redis.url) as two:
        yield one, two


def test_any_replica_takes_any_part(replicas: tuple[Live, Live], video: Path, parts: list[bytes]) -> None:
    one, two = replicas
    upload = create(one, video.stat().st_size).json()["id"]
    sent = [send(live, upload, data).json()["id"] for live, data in zip((two, one, one, two, one), parts, strict=True)]
    for live in replicas:
        assert [part["id"] for part in httpx.get(f"{live.url}/v1/uploads/{upload}").json()["parts"]] == sent
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda live: finish(live, upload, sent), [one, two, one, two]))
    assert sorted(reply.status_code for reply in replies)[0] == 200
    ids = {file["id"] for live in replicas for file in httpx.get(f"{live.url}/v1/files").json()["data"]}
    assert ids == {reply.json()["file"]["id"] for reply in replies if reply.status_code == 200} and len(ids) == 1
    assert {reply.json()["error"]["code"] for reply in replies if reply.status_code != 200} <= {
        "upload_busy",
        "upload_completed",
    }
    assert httpx.get(f"{two.url}/v1/uploads/{upload}").json()["status"] == "completed"
    assert not one.backend.store.nbytes(f"upload/{upload}/part/")
