"""A full-size model through the whole server: ``tests/benchmarks/large_model.py --family videoxl --out RESULT.json``.

Writes a checkpoint of the published 7B sizes with random bfloat16 weights and an hour of H.264, both at the same time,
starts ``x2l serve --model FOLDER``, uploads the hour, waits for its prefill and asks questions one after the other with
the stock client, streamed. Records the plan that the server prints, seconds, bytes per tier, time to the first token,
and memory after every question.

The file is written anew after every phase, so that a run which is cut off leaves what it has found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import to_json, write
from decode_hour import make_hour
from live_server import Live, serving
from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from random_checkpoint import FAMILIES, write_checkpoint

from server.bench.circumstances import circumstances
from server.bench.serving.video import QUESTIONS

WIDTH, HEIGHT, FPS = 640, 360, 25
POLL_S = 0.5
HAS_GPU = shutil.which("nvidia-smi") is not None


def ask_gpu(fields: str) -> str:
    """Of the driver: torch would take some of the GPU's memory to tell."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={gpu}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Memory(threading.Thread):
    """The most memory of the GPU (the driver's figure, all processes) and of the server's process so far."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.most: dict[str, int] = {}
        self._process = psutil.Process(pid)

    def run(self) -> None:
        while not self.stop.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                self.now()

    def now(self) -> dict[str, int]:
        """In MB (10^6 bytes)."""
        found = {"server_rss_mb": round(self._process.memory_info().rss / 1e6)}
        if HAS_GPU:
            found["gpu_mb"] = round(int(ask_gpu("memory.used")) * 2**20 / 1e6)
        for name, value in found.items():
            self.most[name] = max(value, self.most.get(name, 0))
        return found


class Record:
    """The result, and the file that it is written to over and over."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.begin_s = time.monotonic()
        self.result: dict[str, Any] = circumstances("python", sys.argv[0], bundled=False)
        self.result["gpu"] = ask_gpu("name,driver_version,memory.total") if HAS_GPU else None

    def add(self, **found: Any) -> None:
        self.result |= found
        self.result["wall_s"] = round(time.monotonic() - self.begin_s, 1)
        write(self.result, self.out)
        print(to_json(found), flush=True)


def prepare(given: argparse.Namespace, folder: Path, record: Record) -> None:
    """The checkpoint and the video. In processes of their own: what they take of the GPU goes with them."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as makers:
        begin_s = time.monotonic()
        jobs = {"video": makers.submit(make_hour, folder / "hour.mp4", WIDTH, HEIGHT, FPS, given.minutes)}
        if given.model is None:
            jobs["checkpoint"] = makers.submit(write_checkpoint, given.family, folder / given.family, given.layers)
        for name, made in jobs.items():
            made.result()
            record.add(**{f"{name}_made_s": round(time.monotonic() - begin_s, 1)})
    checkpoint = sum(file.stat().st_size for file in (given.model or folder / given.family).iterdir())
    record.add(checkpoint_gb=round(checkpoint / 1e9, 2), file_mb=round((folder / "hour.mp4").stat().st_size / 1e6, 1))


def upload(client: OpenAI, path: Path, given: argparse.Namespace, memory: Memory, record: Record) -> str:
    """The id of the processed file."""
    begin_s = time.monotonic()
    options = {"max_frames": str(given.max_frames)} if given.max_frames else {}
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="user_data", extra_body={"fps": str(given.fps), **options})
    uploaded_s = time.monotonic() - begin_s
    tenths: list[float] = []
    while uploaded.status == "uploaded":
        time.sleep(POLL_S)
        uploaded = client.files.retrieve(uploaded.id)
        video = (uploaded.model_extra or {}).get("video") or {}
        took_s = time.monotonic() - begin_s
        while video.get("progress", 0) * 10 >= len(tenths) + 1:
            tenths.append(round(took_s, 1))
            record.add(tenths_done_s=tenths, most=dict(memory.most))
        if took_s > given.patience_s:
            raise SystemExit(f"after {took_s:.0f} s the prefill had come to {video.get('progress')}")
    if uploaded.status != "processed":
        raise SystemExit(f"the video was not processed: {uploaded.status_details}")
    video = uploaded.to_dict()["video"]
    assert isinstance(video, dict)
    record.add(
        upload_s=round(uploaded_s, 2),
        video=video,
        frames_per_s=round(video["num_frames"] / video["prefill_s"], 1),
        most_in_prefill=dict(memory.most),
        metrics_after_prefill=metrics(str(client.base_url)),
    )
    return uploaded.id


def ask(client: OpenAI, model: str, file_id: str, question: str, max_tokens: int, **dials: Any) -> dict[str, Any]:
    """One streamed answer: milliseconds to the first text, tokens a second behind it, what the server says of it."""
    begin_s = time.perf_counter()
    first_s = 0.0
    usage: Any = None
    x2l: dict[str, Any] = {}
    parts: list[Any] = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"x2l": dials} if dials else None,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        x2l = (chunk.model_extra or {}).get("x2l") or x2l
        if not first_s and chunk.choices and chunk.choices[0].delta.content:
            first_s = time.perf_counter()
    end_s = time.perf_counter()
    tokens = usage.completion_tokens
    return {
        "ttft_ms": round((first_s - begin_s) * 1000, 1),
        "decode_tokens_per_s": round((tokens - 1) / max(end_s - first_s, 1e-9), 1),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": tokens,
        "timings_ms": x2l["timings_ms"],
        "kv_tokens": x2l["kv_tokens"],
        "reload_bytes": x2l["reload_bytes"],
        "reloaded_chunks": [entry["chunk"] for entry in x2l["evidence"]],
        "degraded": x2l["degraded"],
    }


def ask_all(
    client: OpenAI, file_id: str, given: argparse.Namespace, memory: Memory, record: Record, name: str, **dials: Any
) -> None:
    """Every question alone, and the memory behind it."""
    model = client.models.list().data[0].id
    answers: list[dict[str, Any]] = []
    for number in range(given.questions):
        answer = ask(client, model, file_id, QUESTIONS[number % len(QUESTIONS)], given.max_tokens, **dials)
        answers.append({**answer, **memory.now(), "metrics": metrics(str(client.base_url))})
        record.result[name] = {"summary": summary(answers), "answers": answers}
        write(record.result, record.out)
    record.add(most=dict(memory.most))
    print(to_json(record.result[name]["summary"]))


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The first answer apart: what comes first is slower."""
    later = answers[1:] or answers
    times_ms = sorted(answer["ttft_ms"] for answer in later)
    phases = later[0]["timings_ms"]
    return {
        "questions": len(answers),
        "first_ttft_ms": answers[0]["ttft_ms"],
        "ttft_p50_ms": statistics.median(times_ms),
        "ttft_p99_ms": times_ms[-1 - len(times_ms) // 100],
        "phases_p50_ms": {
            phase: round(statistics.median(answer["timings_ms"][phase] for answer in later), 1) for phase in phases
        },
        "decode_tokens_per_s_p50": statistics.median(answer["decode_tokens_per_s"] for answer in later),
        "reload_mb": round(statistics.median(answer["reload_bytes"] for answer in later) / 1e6, 1),
        "kv_tokens": later[-1]["kv_tokens"],
        "grown_from_second_to_last_mb": {
            name: later[-1][name] - later[0][name] for name in ("gpu_mb", "server_rss_mb") if name in later[0]
        },
    }


def metrics(base_url: str) -> dict[str, float]:
    """What ``/metrics`` tells of memory and of the time that prefill took on the engine thread."""
    text = httpx.get(f"{base_url.removesuffix('/').removesuffix('/v1')}/metrics").text
    wanted = ("x2l_resident_bytes", "x2l_device_", "x2l_prefill_chunk_seconds_sum", "x2l_prefilled_chunks")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: round(sample.value, 3) for sample in samples if sample.name.startswith(wanted)}


def run(given: argparse.Namespace, folder: Path, record: Record) -> None:
    prepare(given, folder, record)
    options = ["--model", str(given.model or folder / given.family), *shlex.split(given.serve)]
    begin_s = time.monotonic()
    with given.out.with_suffix(".log").open("w") as log, serving(*options, log=log) as live:
        record.add(plan=dict(live.plan), server_ready_s=round(time.monotonic() - begin_s, 1))
        shutil.rmtree(folder / given.family, ignore_errors=True)  # nothing of the model hangs on its files
        measure(live, given, folder, record)


def measure(live: Live, given: argparse.Namespace, folder: Path, record: Record) -> None:
    memory = Memory(live.pid)
    record.add(idle=memory.now(), metrics_idle=metrics(live.url))
    memory.start()
    try:
        with live.client() as client:
            file_id = upload(client, folder / "hour.mp4", given, memory, record)
            ask_all(client, file_id, given, memory, record, "questions")
            ask_all(client, file_id, given, memory, record, "questions_without_reload", reload=0)
    finally:
        memory.stop.set()
        memory.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--model", type=Path, help="a folder with such a checkpoint, instead of one made here")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the server's log is written beside it")
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--fps", type=float, default=1.0, help="frames sampled a second")
    parser.add_argument("--max-frames", type=int, help="of the video, spread evenly over it")
    parser.add_argument("--layers", type=int, help="of the language model, instead of its 28")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--patience-s", type=float, default=420.0, help="for the prefill")
    parser.add_argument("--serve", default="", help="more options of x2l serve, in one string")
    given = parser.parse_args()
    record = Record(given)
    with tempfile.TemporaryDirectory(prefix="x2l-large-") as folder:
        try:
            run(given, Path(folder), record)
        except (SystemExit, OpenAIError, httpx.HTTPError, OSError, subprocess.SubprocessError) as error:
            record.add(error=f"{type(error).__name__}: {error}")
            raise
    record.add(ok=True)


if __name__ == "__main__":
    main()
