"""Files: taken in once, found again, forgotten without a trace."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from clips import Clip, Clips, blank_media, read_time_s
from PIL import Image
from until import until

from compression.select import Dial
from kvstore.disk import DiskStore
from kvstore.errors import PoolError, QuotaExceeded
from kvstore.memory import MemoryStore
from kvstore.video import VideoStore
from server.engine.errors import FileNotFound, ShuttingDown, VideoFailed
from server.models.videoxl.model import VideoXL
from server.video.errors import NotAVideo, VideoTooLarge
from server.video.reader import Sampling, VideoLimits

Drive = Callable[..., Any]


def decoders() -> list[psutil.Process]:
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if any(part.endswith("worker.py") for part in child.cmdline())]


def test_a_processed_file_tells_what_it_is(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    library = driver.engine.library
    record = driver.upload(four_chunks, filename="a.mp4", purpose="user_data")
    data = four_chunks.path.read_bytes()
    assert (record.filename, record.purpose, record.nbytes) == ("a.mp4", "user_data", len(data))
    assert record.content_sha256 == hashlib.sha256(data).hexdigest()
    assert record.status == "processed" and record.status_details is None and record.expires_at is None
    video = record.video
    assert (video.width, video.height, video.num_frames, video.num_chunks) == (160, 96, 14, 4)
    assert video.chunks_done == 4 and video.progress == 1 and video.duration_s == pytest.approx(14)
    assert [(c.start_s, c.end_s, c.num_frames) for c in video.chunks] == [(0, 4, 4), (4, 8, 4), (8, 12, 4), (12, 14, 2)]
    assert video.tokens_visual == 14 * 4 and video.tokens_low == 14 * 2 and 0 < video.tokens_high < video.tokens_low
    assert video.prefill_s > 0 and video.prefill_mode
    rows = library.chunks(record)
    assert [(chunk.index, resident) for chunk, _, _, resident in rows] == [(i, True) for i in range(4)]
    assert sum(low for _, low, _, _ in rows) == video.tokens_low
    assert b"".join(library.content(record)) == data
    assert library.get(record.id, "") == record and library.list("") == [record]


def test_thumbnails_show_the_middle_of_each_chunk(drive: Drive, clips: Clips) -> None:
    driver = drive()
    record = driver.upload(clips("mp4", width=640, height=360, fps=4.0, duration_s=10.0))
    for index, middle_s in enumerate((2.0, 6.0, 9.0)):
        image = Image.open(io.BytesIO(driver.engine.library.thumbnail(record, index)))
        assert image.format == "JPEG" and image.size == (320, 180)
        assert read_time_s(np.asarray(image)) == middle_s
    assert driver.engine.library.thumbnail(record, 3) is None


def test_known_content_is_processed_at_once(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    first = driver.upload(four_chunks)
    second = driver.upload(four_chunks, wait=False, filename="again.mp4")
    assert second.status == "processed" and second.id != first.id and second.video == first.video
    assert driver.num_prefilled == 4
    other = driver.upload(four_chunks, sampling=Sampling(0.5))
    assert other.video.num_frames == 7 and driver.num_prefilled == 6
    driver.upload(four_chunks, tenant="f" * 64)
    assert driver.num_prefilled == 10  # tenants share nothing


def test_two_uploads_at_the_same_time_share_one_prefill(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    records: list[Any] = []
    threads = [threading.Thread(target=lambda: records.append(driver.upload(four_chunks))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.status for record in records] == ["processed"] * 3
    assert driver.num_prefilled == 4
    assert len({record.id for record in records}) == 3


def test_an_inline_part_keeps_its_record(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    first = driver.upload(two_chunks, source="inline")
    again = driver.upload(two_chunks, source="inline", wait=False)
    assert again.id == first.id and again.expires_at >= first.expires_at > time.time() + 86_000
    assert driver.upload(two_chunks, wait=False).id != first.id
    assert len(driver.engine.library.list("")) == 2


def test_files_expire(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(sweep_interval_s=0.05)
    gone = driver.upload(two_chunks, wait=False, expires_after_s=0)
    assert driver.engine.library.get(gone.id, "") is None
    until(lambda: not list(driver.store.keys()))
    kept = driver.upload(two_chunks, expires_after_s=3600)
    assert driver.engine.library.list("") == [kept]


def test_a_file_expires_alone_where_others_hold_its_content(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(sweep_interval_s=0.05)
    kept = driver.upload(two_chunks)
    text = driver.ask(kept).text
    gone = driver.upload(two_chunks, wait=False, expires_after_s=0)
    until(lambda: not list(driver.store.keys(f"file/{gone.id}")))
    assert driver.ask(kept).text == text and driver.num_prefilled == 2
    assert b"".join(driver.engine.library.content(kept)) == two_chunks.path.read_bytes()


def test_a_file_whose_expiry_was_put_off_meanwhile_stays(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(two_chunks, source="inline")
    as_seen_before = replace(record, expires_at=1)
    assert not driver.engine.library._remove(as_seen_before, only_expired=True)
    assert driver.engine.library.get(record.id, "") == record


def test_a_record_that_a_listing_misses_is_looked_up(drive: Drive, two_chunks: Clip) -> None:
    class Misses(MemoryStore):
        def _keys(self, prefix: str) -> Iterator[str]:
            return iter(() if prefix == "file/" else super()._keys(prefix))

    driver = drive(Misses())
    record = driver.upload(two_chunks)
    assert driver.engine.library.list("") == [record]
    assert driver.ask(record).error is None


@pytest.mark.parametrize("keep_video", [True, False])
def test_deleting_the_last_file_leaves_nothing(drive: Drive, two_chunks: Clip, keep_video: bool) -> None:
    driver = drive(keep_video=keep_video)
    first, second = driver.upload(two_chunks), driver.upload(two_chunks)
    assert (driver.engine.library.content(first) is not None) is keep_video
    assert not driver.engine.library.delete(first.id, "f" * 64)
    assert driver.engine.library.delete(first.id, "")
    assert not driver.engine.library.delete(first.id, "")
    assert driver.ask(second).error is None
    assert driver.engine.library.delete(second.id, "")
    assert list(driver.store.keys()) == [] and driver.engine._pool.nbytes == 0


@pytest.mark.parametrize("expire", [False, True])
def test_what_other_settings_have_made_goes_too(drive: Drive, tmp_path: Path, two_chunks: Clip, expire: bool) -> None:
    path = tmp_path / "store"
    before = drive(DiskStore(path))
    record = before.upload(two_chunks)
    others = [before.upload(two_chunks, sampling=Sampling(0.5)), before.upload(two_chunks, tenant="f" * 64)]
    texts = [before.ask(other).text for other in others]
    theirs = {
        blob
        for other in others
        for blob in before.store.keys(before.engine.library.video(other.id, other.tenant).key.root)
    }
    before.engine.close()
    after = drive(DiskStore(path), low_precision="int8", sweep_interval_s=0.05)
    assert after.ask(record).error is None and after.num_prefilled == 2
    second = after.upload(two_chunks)
    made = set(after.store.keys("kv/")) - theirs
    assert len({blob.split("/")[1] for blob in made}) == 2
    assert after.engine.library.delete(record.id, "")
    assert set(after.store.keys("kv/")) - theirs == made, "another file has this content"
    if expire:
        after.engine.library._records.put(replace(second, expires_at=1))
        until(lambda: not set(after.store.keys("kv/")) - theirs)
    else:
        assert after.engine.library.delete(second.id, "")
    assert set(after.store.keys("kv/")) == theirs
    after.engine.close()
    again = drive(DiskStore(path))
    assert [again.ask(other).text for other in others] == texts and again.num_prefilled == 0
    for other in others:
        assert again.engine.library.delete(other.id, other.tenant)
    assert list(again.store.keys()) == []


def test_deleting_in_mid_prefill_leaves_nothing(drive: Drive, long_clip: Clip, tmp_path: Path) -> None:
    driver = drive()
    with driver.slowly():
        record = driver.upload(long_clip, wait=False)
        waiting = driver.start(record)
        until(lambda: driver.engine.library.get(record.id, "").video.chunks_done >= 3)
        assert list(driver.store.keys("kv/"))
        assert driver.engine.library.delete(record.id, "")
    assert list(driver.store.keys()) == [] and decoders() == [] and list(tmp_path.glob("upload-*")) == []
    assert isinstance(waiting.wait().error, FileNotFound)
    assert driver.engine._pool.nbytes == 0
    assert driver.upload(long_clip).status == "processed"


def test_deleting_an_upload_that_has_not_begun(drive: Drive, long_clip: Clip, two_chunks: Clip, tmp_path: Path) -> None:
    driver = drive(max_concurrent_prefills=1)
    first = driver.upload(long_clip, wait=False)
    queued = driver.upload(two_chunks, wait=False)
    assert driver.engine.library.delete(queued.id, "")
    assert driver.wait_processed(first).status == "processed"
    assert driver.engine.library.list("") == [driver.engine.library.get(first.id, "")]
    assert list(tmp_path.glob("upload-*")) == []


def test_deleting_ends_running_answers(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(max_tokens=20_000)
    record = driver.upload(two_chunks)
    answer = driver.start(record, max_tokens=20_000)
    assert answer.first.wait(30)
    driver.engine.library.delete(record.id, "")
    assert isinstance(answer.wait().error, FileNotFound)
    with pytest.raises(FileNotFound):
        driver.start(record)
    driver.engine._pool.check_integrity()


def test_what_is_no_video_is_refused_at_once(drive: Drive, tmp_path: Path) -> None:
    driver = drive()
    text = tmp_path / "text"
    text.write_text("no video " * 100)
    with pytest.raises(NotAVideo):
        driver.upload(text)
    assert driver.engine.library.list("") == [] and list(driver.store.keys()) == []
    assert list(tmp_path.glob("upload-*")) == []


def test_a_video_beyond_the_models_time_is_refused_at_once(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip
) -> None:
    model = fresh_model()
    model.spec = replace(model.spec, max_duration_s=10.0)
    with pytest.raises(VideoTooLarge, match="where the clock of x2l-tiny ends") as refused:
        drive(model=model).upload(four_chunks)
    assert refused.value.code == "video_too_long"
    with pytest.raises(VideoTooLarge, match=r"at most 5\.0 s are allowed \(the server's --max-duration-s\)"):
        drive(model=model, limits=VideoLimits(max_duration_s=5.0)).upload(four_chunks)
    with pytest.raises(VideoTooLarge):
        drive(limits=VideoLimits(max_frames=13)).upload(four_chunks)


def test_a_video_damaged_further_on_is_an_error(drive: Drive, clips: Clips, tmp_path: Path) -> None:
    source = clips("mp4", width=160, height=96, fps=5.0, duration_s=60.0)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(source.path.read_bytes())
    blank_media(damaged, 0.5)
    driver = drive()
    record = driver.upload(damaged, wait=False)
    waiting = driver.start(record)
    record = driver.wait_processed(record)
    assert record.status == "error" and record.status_details
    assert isinstance(waiting.wait().error, VideoFailed)
    with pytest.raises(VideoFailed, match=record.status_details.split(".")[0]):
        driver.start(record)
    assert not list(driver.store.keys("kv/"))


def test_a_video_past_the_models_positions_is_refused(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, long_clip: Clip
) -> None:
    driver = drive(model=fresh_model(max_position_embeddings=30))
    with pytest.raises(VideoTooLarge, match="14 sampled frames; x2l-tiny has positions for at most 3, "):
        driver.upload(four_chunks)
    assert driver.engine.library.list("") == [] and not list(driver.store.keys(""))
    # Taken by a replica whose model had room for it.
    store = MemoryStore()
    before = drive(store)
    with before.slowly():
        record = before.upload(long_clip, wait=False)
        before.engine.close()
    after = drive(store, model=fresh_model(max_position_embeddings=30)).wait_processed(record)
    assert after.status == "error" and "positions for at most 3" in after.status_details


def test_a_video_takes_the_first_mode_that_has_room(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, long_clip: Clip
) -> None:
    driver = drive(model=fresh_model(max_position_embeddings=200))
    short, long = driver.upload(four_chunks), driver.upload(long_clip)
    assert (short.video.prefill_mode, long.video.prefill_mode) == ("exact", "recent-2")
    assert driver.ask(long).error is None
    # The same KVs as where that mode was asked for, under another key: no store mixes what two settings make.
    other = drive(model=fresh_model(max_position_embeddings=200, prefill_mode="recent-2"))
    asked = other.upload(long_clip)
    videos = [driver.engine.library.video(long.id, ""), other.engine.library.video(asked.id, "")]
    assert [video.manifest.prefill_mode for video in videos] == ["recent-2", "recent-2"]
    assert videos[0].key != videos[1].key
    ours, theirs = (
        {key.removeprefix(video.key.root): bytes(store.get(key)) for key in store.keys(video.key.root)}
        for store, video in zip((driver.store, other.store), videos, strict=True)
    )
    assert len(ours) == 3 * 50 + 2 and ours.pop("manifest") != theirs.pop("manifest")
    assert ours == theirs


def test_a_video_takes_the_first_mode_that_fits_into_memory(drive: Drive, four_chunks: Clip, long_clip: Clip) -> None:
    driver = drive()
    exact = driver.upload(long_clip)
    assert exact.video.prefill_mode == "exact"
    # What the L pass of the long video would remember alone does not fit.
    little = drive(prefill_nbytes=exact.video.nbytes_low - 1)
    short, long = little.upload(four_chunks), little.upload(long_clip)
    assert (short.video.prefill_mode, long.video.prefill_mode) == ("exact", "recent-2")
    assert little.ask(long).error is None
    with pytest.raises(VideoTooLarge, match="bytes or more of KVs on the device, where there is room for 1000"):
        drive(prefill_nbytes=1000).upload(long_clip)


def test_an_interrupted_upload_resumes_at_the_first_missing_chunk(
    drive: Drive, long_clip: Clip, tmp_path: Path
) -> None:
    whole = drive()
    text = whole.ask(whole.upload(long_clip)).text
    store = MemoryStore()
    before = drive(store)
    with before.slowly():
        record = before.upload(long_clip, wait=False)
        until(lambda: before.engine.library.get(record.id, "").video.chunks_done >= 5)
        before.engine.close()
    assert decoders() == [] and list(tmp_path.glob("upload-*")) == []
    done = {key.rpartition("/")[2] for key in store.keys("kv/") if "/thumb/" in key}
    store.delete(next(key for key in store.keys("kv/") if key.endswith("high/00004")))
    after = drive(store)
    assert after.engine.library.get(record.id, "").status == "uploaded"
    assert after.ask(record).text == text
    assert after.engine.library.get(record.id, "").status == "processed"
    assert len(done) >= 5 and after.num_prefilled == 50 - 4
    blobs = {key: bytes(whole.store.get(key)) for key in whole.store.keys("kv/") if not key.endswith("manifest")}
    assert blobs == {key: bytes(store.get(key)) for key in store.keys("kv/") if not key.endswith("manifest")}


def test_an_interrupted_upload_whose_bytes_were_not_kept_fails(drive: Drive, long_clip: Clip) -> None:
    store = MemoryStore()
    before = drive(store, keep_video=False)
    with before.slowly():
        record = before.upload(long_clip, wait=False)
        before.engine.close()
    after = drive(store, keep_video=False)
    record = after.wait_processed(record)
    assert record.status == "error" and "upload it again" in record.status_details
    assert after.upload(long_clip).status == after.engine.library.get(record.id, "").status == "processed"


def test_a_failed_file_stays_failed_over_a_restart(drive: Drive, clips: Clips, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips("mp4", width=160, height=96, fps=5.0, duration_s=14.0).path.read_bytes())
    blank_media(damaged, 0.5)
    before = drive(store)
    record = before.upload(damaged)
    assert record.status == "error"
    before.engine.close()
    assert drive(store).engine.library.get(record.id, "") == record


def test_another_model_prefills_its_own(drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip) -> None:
    store = MemoryStore()
    before = drive(store)
    record = before.upload(four_chunks)
    text = before.ask(record).text
    before.engine.close()
    after = drive(store, model=fresh_model(high_cmpr_ratio=4))
    outcome = after.ask(record).outcome
    assert outcome.high_tokens > before.engine._model.prefix().num_tokens + record.video.tokens_high
    assert after.num_prefilled == 4
    after.engine.close()
    again = drive(store)
    assert again.ask(record).text == text and again.num_prefilled == 0


def test_a_video_that_the_device_has_no_room_for_is_refused_before_its_prefill(
    drive: Drive, four_chunks: Clip, two_chunks: Clip
) -> None:
    store = MemoryStore()
    roomy = drive(store)
    long, short = roomy.upload(four_chunks), roomy.upload(two_chunks)
    needed = long.video.nbytes_high + roomy.engine._model.prefix().nbytes
    roomy.engine.close()
    blobs = set(store.keys())
    tight = drive(store, resident_nbytes=needed - 1)
    assert tight.ask(short).error is None
    with pytest.raises(VideoTooLarge, match="--gpu-kv-budget"):
        tight.upload(four_chunks)  # whose KVs are there
    assert isinstance(tight.ask(long).error, PoolError)
    assert set(store.keys()) == blobs
    # The prefix and roundings show as the chunks come.
    late = drive(resident_nbytes=needed - 1).upload(four_chunks)
    assert late.status == "error" and "--gpu-kv-budget" in late.status_details
    early = drive(resident_nbytes=long.video.nbytes_high // 2)
    with pytest.raises(VideoTooLarge, match="--gpu-kv-budget"):
        early.upload(four_chunks)
    assert early.engine.library.list("") == [] and not list(early.store.keys())
    exact = drive(resident_nbytes=needed)
    assert exact.ask(exact.upload(four_chunks)).error is None
    # Taken by a server that had room for it.
    store = MemoryStore()
    before = drive(store, start=False)
    record = before.upload(four_chunks, wait=False)
    after = drive(store, resident_nbytes=long.video.nbytes_high // 2)
    failed = after.wait_processed(record)
    assert failed.status == "error" and "--gpu-kv-budget" in failed.status_details and after.num_prefilled == 0


def test_a_file_says_that_other_settings_must_prefill_it(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    store = MemoryStore()
    before = drive(store)
    first, second = before.upload(two_chunks), before.upload(two_chunks, wait=False)
    assert second.video == first.video
    before.engine.close()
    after = drive(store, model=fresh_model(high_cmpr_ratio=4))
    for file in (*after.engine.library.list(""), *(after.engine.library.get(file.id, "") for file in (first, second))):
        assert file.status == "processed" and "next question has it prefilled again" in file.status_details
        assert file.video == first.video.without_kvs() and (file.video.nbytes_low, file.video.nbytes_high) == (0, 0)
    assert after.ask(second).error is None
    for file in after.engine.library.list(""):
        assert (file.status, file.status_details) == ("processed", None)
        assert file.video.nbytes_high > first.video.nbytes_high and file.video.nbytes_low == first.video.nbytes_low
    after.engine.close()
    again = drive(store)
    assert sorted(again.engine.library.list(""), key=lambda file: file.created_ns) == [first, second]


def test_a_file_that_other_settings_cannot_prefill_says_so(drive: Drive, two_chunks: Clip) -> None:
    store = MemoryStore()
    before = drive(store, keep_video=False)
    record = before.upload(two_chunks)
    before.engine.close()
    after = drive(store, keep_video=False, low_precision="int8")
    (file,) = after.engine.library.list("")
    assert file.status == "error" and "upload it again" in file.status_details
    with pytest.raises(VideoFailed, match="upload it again"):
        after.start(record)
    after.engine.close()
    again = drive(store, keep_video=False)
    assert again.engine.library.list("") == [record] and again.ask(record).error is None


def test_the_quota_removes_the_least_recently_used(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    measure = drive()
    measure.upload(four_chunks)
    quota = measure.store.nbytes("kv/") + measure.store.nbytes("content/") + 4000
    driver = drive(store_quota_bytes=quota)
    old = driver.upload(two_chunks)
    assert driver.ask(old).error is None
    new = driver.upload(four_chunks)
    assert driver.ask(new).error is None
    lost = driver.engine.library.get(old.id, "")
    assert lost.status == "error" and "quota" in lost.status_details
    assert lost.video == old.video.without_kvs() and lost.video.nbytes_low == 0
    assert driver.engine.library._records.get(old.id) == lost
    with pytest.raises(VideoFailed, match="quota"):
        driver.start(old)
    assert 0 < driver.store.nbytes("kv/") + driver.store.nbytes("content/") <= quota


def test_the_quota_does_not_change_why_a_video_failed(
    drive: Drive, clips: Clips, four_chunks: Clip, tmp_path: Path
) -> None:
    measure = drive()
    measure.upload(four_chunks)
    driver = drive(store_quota_bytes=measure.store.nbytes("kv/") + measure.store.nbytes("content/") + 4000)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips("mp4", width=160, height=96, fps=5.0, duration_s=14.0).path.read_bytes())
    blank_media(damaged, 0.5)
    failed = driver.wait_processed(driver.upload(damaged, wait=False))
    why = failed.status_details
    assert failed.status == "error" and "damaged" in why and driver.store.nbytes(failed.content.root) > 0
    assert driver.ask(driver.upload(four_chunks)).error is None
    assert driver.store.nbytes(failed.content.root) == 0
    assert driver.engine.library.get(failed.id, "").status_details == why


def test_the_quota_spares_what_is_pinned(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    measure = drive()
    measure.upload(four_chunks)
    quota = measure.store.nbytes("kv/") + measure.store.nbytes("content/") + 4000
    driver = drive(store_quota_bytes=quota)
    old = driver.upload(two_chunks, pinned=True)
    refused = driver.upload(four_chunks)
    assert refused.status == "error" and "quota" in refused.status_details
    assert driver.ask(old).error is None
    unpinned = driver.engine.library.pin(old.id, "", False)
    assert not unpinned.pinned and driver.engine.library.get(old.id, "") == unpinned
    assert driver.upload(four_chunks).status == "processed"
    assert driver.engine.library.get(old.id, "").status == "error"
    assert driver.engine.library.pin(old.id, "f" * 64, True) is None


def test_a_file_whose_kvs_the_quota_removed_is_healed_from_its_bytes(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(store_quota_bytes=10**9)
    record = driver.upload(two_chunks)
    text = driver.ask(record).text
    driver.engine.library.make_room(10**9 - two_chunks.path.stat().st_size - 2000)
    assert list(driver.store.keys("kv/")) == []
    lost = driver.engine.library.get(record.id, "")
    assert lost.status == "processed" and "the quota removed them" in lost.status_details
    assert lost.video == record.video.without_kvs() and driver.engine.library.list("") == [lost]
    assert driver.ask(record).text == text and driver.num_prefilled == 4
    healed = driver.engine.library.get(record.id, "")
    assert healed == replace(record, video=replace(record.video, prefill_s=healed.video.prefill_s))
    with pytest.raises(QuotaExceeded):
        driver.engine.library.check_room(10**9 + 1)


def test_a_pin_survives_a_restart(drive: Drive, two_chunks: Clip) -> None:
    store = MemoryStore()
    before = drive(store)
    record = before.engine.library.pin(before.upload(two_chunks).id, "", True)
    before.engine.close()
    assert record.pinned and drive(store).engine.library.list("") == [record]


def test_a_question_prefills_an_evicted_video_again(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    text = driver.ask(record).text
    key = driver.engine.library.video(record.id, "").key
    VideoStore(driver.store).delete(key)
    driver.engine._pool.discard(key)
    answers = [driver.start(record) for _ in range(3)]
    assert [answer.wait().text for answer in answers] == [text] * 3
    assert driver.num_prefilled == 8


def test_a_video_larger_than_the_quota_fails_and_leaves_no_kvs(drive: Drive, four_chunks: Clip) -> None:
    driver = drive(store_quota_bytes=four_chunks.path.stat().st_size + 2000)
    record = driver.upload(four_chunks)
    assert record.status == "error" and "quota" in record.status_details
    assert not list(driver.store.keys("kv/"))


def test_closing_drains_and_then_refuses(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(max_tokens=20_000)
    record = driver.upload(two_chunks)
    assert driver.engine.ready
    short = driver.start(record, max_tokens=300)
    driver.engine.close(drain_s=60)
    assert short.wait().finish_reason == "length" and not driver.engine.ready
    with pytest.raises(ShuttingDown):
        driver.start(record)


def test_closing_ends_what_does_not_finish_in_time(drive: Drive, two_chunks: Clip, long_clip: Clip) -> None:
    driver = drive(max_tokens=20_000)
    record = driver.upload(two_chunks)
    endless = driver.start(record, max_tokens=20_000)
    with driver.slowly():
        waiting = driver.start(driver.upload(long_clip, wait=False), dial=Dial(reload=1))
        assert endless.first.wait(30)
        driver.engine.close(drain_s=0.1)
    assert isinstance(endless.wait().error, ShuttingDown) and isinstance(waiting.wait().error, ShuttingDown)
    assert decoders() == []
