"""A checkpoint in Video-XL's public layout, served: what it says of itself, its answers, and its limits."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from checkpoints import TINY, random_weights, write_checkpoint
from clips import Clip, Clips
from live import Live, Serve, ask
from safetensors.torch import load_file, save_file
from tiny_transformers import save_qwen2_5_vl

from server.models.videoxl.pretrained import PREFIX

PREFIX_TOKENS = len(re.sub(r"<\|\w+\|>", "#", PREFIX))  # a token a character
POSITIONS = 240
CONFIG = TINY | {"max_position_embeddings": POSITIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny-xl", random_weights(CONFIG), CONFIG, files="sharded"
    )


@pytest.fixture(scope="module")
def served(serve: Serve, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(model=str(folder), store=f"disk:{tmp_path_factory.mktemp('store')}") as live:
        yield live


@pytest.fixture(scope="module")
def stock(served: Live) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def short(clips: Clips) -> Clip:
    """Chunks of 4, 4, 4 and 2 frames."""
    return clips("mp4", width=160, height=96, fps=5.0, duration_s=14.0)


@pytest.fixture(scope="module")
def long(clips: Clips) -> Clip:
    return clips("mp4", width=128, height=64, fps=2.0, duration_s=200.0)


def upload(client: openai.OpenAI, clip: Clip, **fields: Any) -> dict[str, Any]:
    file = client.files.create(file=clip.path, purpose="user_data", extra_body=fields)
    done = client.files.wait_for_processing(file.id, poll_interval=0.05)
    assert done.status == "processed", done.status_details
    return done.model_dump()


def answer(client: openai.OpenAI, file_id: str, **x2l: Any) -> dict[str, Any]:
    reply = client.chat.completions.create(
        model="tiny-xl", messages=ask(file_id, "Who?"), max_tokens=3, extra_body={"x2l": x2l} if x2l else None
    )
    return reply.model_dump()


def test_a_video_and_a_question(stock: openai.OpenAI, short: Clip) -> None:
    assert [model.id for model in stock.models.list()] == ["tiny-xl"]
    file = upload(stock, short)
    video = file["video"]
    assert (video["num_frames"], video["num_chunks"], video["prefill_mode"]) == (14, 4, "exact")
    # The ends are at 2. At 32 the carry runs on: two chunks of 16 visual tokens make one VST together.
    assert video["tokens"] == {"visual": 56, "low": 28, "high": 8 + 0 + 1 + 4}
    low, high = PREFIX_TOKENS + 28, PREFIX_TOKENS + 13
    for dial, mixed in (({"mode": "high"}, high), ({"mode": "low"}, low), ({"chunks": [1]}, high + 8), ({}, None)):
        reply = answer(stock, file["id"], **dial)
        kv_tokens = reply["x2l"]["kv_tokens"]
        assert (kv_tokens["low"], kv_tokens["high"]) == (low, high)
        assert mixed is None or kv_tokens["mixed"] == mixed
        prompt = len("\nWho?#\n#assistant\n")
        assert reply["usage"]["prompt_tokens"] == kv_tokens["mixed"] + prompt
        assert len(reply["x2l"]["evidence"]) == {"high": 0, "low": 4}.get(
            dial.get("mode"), len(dial.get("chunks", "abc"))
        )
    assert answer(stock, file["id"])["choices"] == answer(stock, file["id"])["choices"], (
        "greedy, whatever the files say"
    )
    talk = stock.chat.completions.create(model="tiny-xl", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert talk.usage is not None and talk.usage.completion_tokens <= 2


def test_a_longer_video_takes_the_next_cheaper_mode(
    stock: openai.OpenAI, served: Live, short: Clip, long: Clip
) -> None:
    file = upload(stock, long)
    video = file["video"]
    assert (video["num_chunks"], video["prefill_mode"]) == (50, "recent-2")
    assert video["tokens"]["low"] == 400  # more than there are positions for at once
    assert upload(stock, short)["video"]["prefill_mode"] == "exact"
    manifest = served.backend.engine.library.video(file["id"], "").manifest
    assert manifest is not None and manifest.prefill_mode == "recent-2"
    assert answer(stock, file["id"])["x2l"]["evidence"]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        answer(stock, file["id"], mode="low")


def test_a_video_that_fits_in_no_mode_is_refused_at_upload(stock: openai.OpenAI, long: Clip) -> None:
    before = {file.id for file in stock.files.list()}
    with pytest.raises(openai.BadRequestError) as refused:
        upload(stock, long, fps=8)
    assert (refused.value.code, refused.value.param) == ("video_too_long", "file")
    message = str(refused.value.body["message"])  # type: ignore[index]
    match = re.search(r"at most (\d+), which are ([\d.]+) s", message)
    assert match, message
    most, longest_s = int(match[1]), float(match[2])
    assert longest_s == pytest.approx(most / 8, abs=0.1) and 0 < longest_s < 200
    assert {file.id for file in stock.files.list()} == before, "nothing is left of it"
    assert upload(stock, long, fps=8, max_frames=most)["video"]["num_frames"] == most
    with pytest.raises(openai.BadRequestError, match=f"{most + 1} sampled frames"):
        upload(stock, long, fps=8, max_frames=most + 1)


def test_the_default_re_load_shrinks_where_there_is_no_room(stock: openai.OpenAI, long: Clip) -> None:
    file = upload(stock, long, fps=6)
    used = PREFIX_TOKENS + file["video"]["tokens"]["high"] + len("\n#\n#assistant\n") + 1
    question = "?" * (POSITIONS - used - 10)  # one more chunk of 8 L-KVs fits, three do not
    inner = {"start_s": 20, "end_s": 100}
    reply = stock.chat.completions.create(
        model="tiny-xl", messages=ask(file["id"], question), max_tokens=1, extra_body={"x2l": inner}
    )
    assert len(reply.model_dump()["x2l"]["evidence"]) in (1, 2)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        stock.chat.completions.create(
            model="tiny-xl", messages=ask(file["id"], question), max_tokens=1, extra_body={"x2l": inner | {"reload": 3}}
        )


def test_another_mode_is_another_key(
    serve: Serve, folder: Path, served: Live, stock: openai.OpenAI, short: Clip
) -> None:
    exact = upload(stock, short)
    root = served.backend.model.fingerprint
    with serve(model=str(folder), prefill_mode="high-memory") as other, other.client() as client:
        assert other.backend.model.fingerprint != root
        assert upload(client, short)["video"]["prefill_mode"] == "high-memory"
    assert exact["video"]["prefill_mode"] == "exact"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("X2L_", "HF_"))}
    command = [sys.executable, "-m", "server", "serve", "--store", "memory://", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=kept | variables)


def test_serve_tells_what_it_will_do(folder: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--model", str(folder), "--store", "memory://", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = {}
        for line in process.stdout:
            name, _, value = line.strip().partition(" ")
            lines[name] = value.strip()
            if name == "address":
                break
        assert httpx.get(f"{lines['address']}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    num_parameters = sum(
        weight.numel() for name, weight in random_weights(CONFIG).items() if "post_layernorm" not in name
    )
    assert lines["model"] == f"tiny-xl, {num_parameters / 1e6:.1f} M parameters"
    assert lines["device"] == "cpu, float32"
    assert lines["chunk"] == "4 frames of 4 tokens, 4 s at 1 fps"
    *modes, limit = lines["prefill"].split(", ")
    assert limit == "where the model's positions end"
    assert [mode.split()[0] for mode in modes] == ["exact", "recent-2", "high-memory", "bounded-8"]
    assert all(re.fullmatch(r"\S+ up to 0:\d\d:\d\d", mode) for mode in modes)
    assert lines["ratios"] == "2 (detailed) and 32 (small), re-load 3 chunks"
    # 2 layers, 2 heads of 8, keys and values: 64 numbers of 4 bytes; 14,400 visual tokens an hour.
    assert lines["KV"] == "0.25 KiB a token"
    assert lines["size"] == "1.8 MB (detailed) and 0.1 MB (small) of KVs per video-hour"


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that knows no repository."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("content-length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_without_the_model_or_out_of_reach(hub: str, tmp_path: Path) -> None:
    for endpoint, words in ((hub, "hub has none of this name"), ("http://127.0.0.1:9", "hub cannot be reached")):
        stopped = run("--model", "nobody/nothing", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
        assert stopped.returncode == 1
        assert stopped.stderr.count("\n") == 1 and "nobody/nothing" in stopped.stderr and words in stopped.stderr


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    del weights["model.norm.weight"]
    write_checkpoint(tmp_path / "xl", weights, CONFIG)
    save_qwen2_5_vl(tmp_path / "qwen")
    weights = load_file(tmp_path / "qwen" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    for name, missing in (("xl", "model.norm.weight"), ("qwen", "model.language_model.norm.weight")):
        stopped = run("--model", str(tmp_path / name))
        assert stopped.returncode == 1
        assert stopped.stderr.count("\n") == 1 and f"missing tensors: {missing}" in stopped.stderr
