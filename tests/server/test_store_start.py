"""A store that cannot be used: one clear line at the start, and nothing of it is changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from redis_servers import RedisServer, free_port
from tiny_transformers import save_qwen2_5_vl

from kvstore import envelope
from kvstore.errors import InvalidStoreURL
from kvstore.open import open_store, without_password
from server.app import open_backend
from server.cli import main
from server.config import load_settings


def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What ``x2l serve`` says as it refuses to start."""
    monkeypatch.setattr(sys, "argv", ["x2l", "serve", "--port", "0", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "secret" not in err
    return err


@pytest.fixture
def settings_from_options_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("X2L_STORE", "X2L_STORE_CACHE_BYTES", "X2L_WAIT_FOR_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("settings_from_options_alone")
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://:secret@host", "not a store URL of scheme 'ftp'"),
        ("redis://:secret@", "names no host"),
        ("redis://:secret@127.0.0.1:{port}/0", "cannot open the store: redis://127.0.0.1:"),
        ("rediss://:secret@127.0.0.1:{port}", "cannot open the store: rediss://127.0.0.1:"),
        ("redis://:secret@127.0.0.1:{port}?cluster=true", "cannot open the store: redis://127.0.0.1:"),
    ],
)
def test_unknown_and_unreachable(monkeypatch, capsys, url, says):
    assert says in serve(monkeypatch, capsys, "--store", url.format(port=free_port()))


@pytest.mark.usefixtures("settings_from_options_alone")
def test_refused_passwords_and_newer_layouts(monkeypatch, capsys, tmp_path):
    with RedisServer(tmp_path, password="word") as server:
        url = f"redis://:secret@127.0.0.1:{server.port}"
        # Waiting would not help.
        assert "refuses the user or password" in serve(monkeypatch, capsys, "--store", url, "--wait-for-store", "600")
        with server.client() as client:
            client.set("x2l:layout", 99)
            client.set("x2l:{kv/a}", "left alone")
            assert "layout version 99" in serve(monkeypatch, capsys, "--store", server.url)
            assert sorted(client.keys()) == [b"x2l:layout", b"x2l:{kv/a}"]


@pytest.mark.usefixtures("settings_from_options_alone")
def test_a_disk_store_of_a_newer_version(monkeypatch, capsys, tmp_path):
    open_store(f"disk:{tmp_path}").close()
    (tmp_path / "x2l-store").write_text("99\n")
    before = sorted(tmp_path.rglob("*"))
    assert "layout version 99" in serve(monkeypatch, capsys, "--store", f"disk:{tmp_path}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("settings_from_options_alone")
def test_a_store_that_a_newer_version_has_written_to(monkeypatch, capsys, tmp_path):
    blob = "file/file-0123456789abcdef01234567"
    store = open_store(f"disk:{tmp_path / 'store'}")
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        store.put(blob, b"of a later version")
    store.close()
    file = next((tmp_path / "store" / "blobs" / blob).parent.iterdir())
    before = file.read_bytes()
    assert "format version" in serve(monkeypatch, capsys, "--store", f"disk:{tmp_path / 'store'}")
    assert file.read_bytes() == before


def test_a_store_opened_for_a_model_that_is_not_there_is_closed(tmp_path):
    fds = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="nowhere"):
        open_backend(load_settings(model=str(tmp_path / "nowhere"), store=f"disk:{tmp_path / 'store'}"))
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_settings_reach_the_engine(tmp_path):
    store = f"disk:{tmp_path}"
    backend = open_backend(load_settings(store=store, kv_dtype="int8", store_cache_bytes="1MiB"))
    assert type(backend.store).__name__ == "TieredStore"
    assert backend.engine._options.low_precision == "int8"
    backend.close()


def test_a_url_that_may_be_shown():
    assert without_password("redis://user:p@ss@host:1/2?a=b") == "redis://***@host:1/2?a=b"
    for url in ("redis://host/1", "memory://", "disk:/a@b", "rediss://host"):
        assert without_password(url) == url
    with pytest.raises(InvalidStoreURL):
        open_store("redis://user:p@ss@/1")


def test_the_compressor_reaches_the_model(tmp_path):
    save_qwen2_5_vl(tmp_path)
    folder = {"store": "memory://", "model": str(tmp_path), "device": "cpu"}
    backend = open_backend(load_settings(**folder, compressor="keydiff", high_ratio=9))
    backend.close()
    assert (backend.model.compression.compressor, backend.model.spec.high_ratio) == ("keydiff", 9)
    for wrong in ({**folder, "compressor": "magic"}, {"store": "memory://", "compressor": "keydiff"}):
        with pytest.raises(ValueError, match="compressor"):
            open_backend(load_settings(**wrong))


def test_the_prefill_mode_reaches_the_model():
    exact = open_backend(load_settings(store="memory://"))
    exact.close()
    backend = open_backend(load_settings(store="memory://", prefill_mode="high-memory"))
    try:
        assert (exact.model.prefill_mode, backend.model.prefill_mode) == ("exact", "high-memory")
        assert backend.model.fingerprint != exact.model.fingerprint
    finally:
        backend.close()
