"""What only a disk can do to its store: crashes, full disks, other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.disk import DiskStore
from kvstore.errors import CorruptBlob, FormatVersionError, InvalidStoreURL, StoreFull, StoreUnavailable
from kvstore.open import open_store

ROOT = Path(__file__).parents[2]


@contextmanager
def python(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``code`` with the packages at hand; it ends with the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_survives_a_reopening(tmp_path):
    store = DiskStore(tmp_path)
    store.put("kv/a", b"abc")
    store.close()
    store = DiskStore(tmp_path)
    assert store.get("kv/a") == b"abc"
    store.close()


def test_home_folder_in_the_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("disk:~/deep/store").close()
    assert (tmp_path / "deep/store/x2l-store").exists()


def test_leaves_nothing_open_and_nothing_beside_the_blobs(tmp_path):
    fds = len(list(Path("/proc/self/fd").iterdir()))
    store = DiskStore(tmp_path)
    store.put("a/b", b"abc")
    store.get("a/b")
    store.delete("a/b")
    store.put("c", b"abc")
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert [str(path.relative_to(tmp_path)) for path in files(tmp_path)] == ["blobs/c+x2l", "x2l-store"]
    assert not (tmp_path / "blobs/a").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_blobs_are_private_to_the_user(tmp_path):
    store = DiskStore(tmp_path / "new")
    store.put("a/b", b"abc")
    store.close()
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "tmp/session").mkdir(parents=True)
    (tmp_path / "tmp/session/thesis.txt").write_text("years of work")
    with pytest.raises(InvalidStoreURL, match="folder of its own"):
        DiskStore(tmp_path)
    assert files(tmp_path) == [tmp_path / "tmp/session/thesis.txt"]


def test_a_newer_layout_is_refused_and_left_alone(tmp_path):
    DiskStore(tmp_path).close()
    (tmp_path / "x2l-store").write_text("2\n")
    before = files(tmp_path)
    with pytest.raises(FormatVersionError, match="version 2"):
        DiskStore(tmp_path)
    assert files(tmp_path) == before


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StoreUnavailable, match="cannot open the store"):
            DiskStore(path)


def test_a_store_whose_folder_vanished(tmp_path):
    store = DiskStore(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "gone")
    with pytest.raises(StoreUnavailable):
        store.put("a", b"x")
    assert store.get("a") is None
    assert not (tmp_path / "store").exists()
    store.close()


WRITER = """
import sys
from pathlib import Path
from kvstore.disk import DiskStore
store = DiskStore(Path(sys.argv[1]))
print("open", flush=True)
fill = 0
while True:
    fill = fill % 255 + 1
    store.put("kv/big", bytes([fill]) * 8_000_000)
    store.put(f"kv/{fill}", bytes([fill]) * 1000)
"""


def test_a_killed_writer_leaves_no_partial_blob(tmp_path):
    num_partial = 0
    for attempt in range(50):
        with python(WRITER, tmp_path) as writer:
            assert writer.stdout.readline() == "open\n"
            time.sleep(0.01 + 0.007 * attempt)
            writer.send_signal(signal.SIGKILL)
        num_partial += len(files(tmp_path / "tmp")) - 1  # besides the lock
        store = DiskStore(tmp_path)
        for key in store.keys("kv/"):
            data = store.get(key)  # would raise CorruptBlob
            assert len(set(data)) == 1
            assert len(data) == (8_000_000 if key == "kv/big" else 1000)
        # Everything is gone but the lock of the session just opened.
        assert [path.name for path in files(tmp_path / "tmp")] == ["lock"]
        store.close()
        if num_partial == 3:
            return
    pytest.fail("too few kills struck while a blob was being written: the test proves nothing")


def test_opening_spares_what_another_process_is_writing(tmp_path):
    with python(WRITER, tmp_path) as writer:
        assert writer.stdout.readline() == "open\n"
        deadline = time.monotonic() + 60
        before = None
        while before is None and time.monotonic() < deadline:
            store = DiskStore(tmp_path)
            before = store.stat("kv/2")
            store.close()
        assert before is not None
        store = DiskStore(tmp_path)
        while store.stat("kv/9") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer.poll() is None, "the writer lost its files"
        assert store.stat("kv/9") is not None
        store.close()


TWO = """
import sys
from pathlib import Path
from kvstore.disk import DiskStore
store = DiskStore(Path(sys.argv[1]))
fill = int(sys.argv[2])
for turn in range(60):
    for key in ("kv/a/x", "kv/b"):
        store.put(key, bytes([fill]) * (fill * 20_000))
        data = store.get(key)
        assert data is None or len(set(data)) == 1 and len(data) == data[0] * 20_000
        if turn % 5 == 0:
            store.delete(key)
store.close()
"""


def test_two_processes_on_the_same_keys(tmp_path):
    with python(TWO, tmp_path, 3) as one, python(TWO, tmp_path, 7) as other:
        assert [process.wait(timeout=120) for process in (one, other)] == [0, 0]
    store = DiskStore(tmp_path)
    for key in ("kv/a/x", "kv/b"):
        assert bytes(store.get(key)) in {bytes([fill]) * (fill * 20_000) for fill in (3, 7)}
    store.close()
    assert list((tmp_path / "tmp").iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from kvstore.disk import DiskStore
from kvstore.errors import StoreFull
store = DiskStore(Path(sys.argv[1]))
store.put("a", b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.put("a", bytes(200_000))
except StoreFull as error:
    print(error)
assert store.get("a") == b"before"
store.put("b", bytes(50_000))
store.close()
"""


def test_a_write_cut_short_changes_nothing(tmp_path):
    with python(LIMITED, tmp_path) as process:
        assert "cannot write a" in process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert [path.name for path in files(tmp_path)] == ["a+x2l", "b+x2l", "x2l-store"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_and_no_truncated_blob(small_disk):
    store = DiskStore(small_disk)
    store.put("kept", b"k" * 100_000)
    with pytest.raises(StoreFull):
        for index in range(100):
            store.put(f"fill/{index}", bytes([index]) * 100_000)
    written = list(store.keys("fill/"))
    assert 3 <= len(written) <= 9
    for key in (*written, "kept"):
        assert len(store.get(key)) == 100_000
    with pytest.raises(StoreFull):
        store.put("kept", b"n" * 1_000_000)
    assert store.get("kept") == b"k" * 100_000
    assert [path.name for path in files(small_disk / "tmp")] == ["lock"]
    # Deleting works on a full disk and makes room again.
    for key in written:
        store.delete(key)
    store.put("fill/again", bytes(300_000))
    store.close()


def test_one_flipped_byte_on_the_medium(tmp_path):
    store = DiskStore(tmp_path)
    store.put("a", b"0123456789")
    path = tmp_path / "blobs/a+x2l"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptBlob):
        store.get("a")
    store.close()
