"""vLLM's server beside this one: ``python tests/benchmarks/vllm_serve.py --model FOLDER --out RESULT.json``

The same weights (a Qwen2.5-VL; random ones of 7B are made without ``--model``), questions, and number of frames, over
HTTP, one server after the other on the same GPU:

- single questions: from a video that the server has never seen to the first token (``prefill_ttft_s``), and then
  other questions about it, one at a time. vLLM keeps the whole KVs on the device (prefix caching), but gets the video
  with every question, and decodes it each time: ``url``, the file as it is; ``sampled``, a file with one frame a second
  only and a ``uuid``, with which it neither hashes nor prepares frames that it has seen (0.25.1 takes no ``uuid`` alone
  of a video). ``engine_ms`` is what its own metrics tell of waiting and prefill, without the decoding of the file;
- ``load``: questions to several videos, all seen before, all at once, against one at a time (vLLM: ``sampled``).

vLLM wants an environment of its own (``python -m venv V; V/bin/pip install vllm``; ``--vllm-python V/bin/python``).
Times are those of the client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

import httpx
from common import to_json, write
from large_model import FPS, HAS_GPU, HEIGHT, WIDTH, ask_gpu
from live_server import serving
from random_checkpoint import write_checkpoint

from server.bench.circumstances import circumstances
from server.bench.long_video import write_long_videos
from server.bench.serving.video import QUESTIONS
from server.client import connect, event_stream
from server.models.families.patches import FRAME_TOKENS

READY_S = 300.0
ENGINE_SECONDS = (
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "x2l_first_token_seconds_sum",
)
Part = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Seconds to the first text and to the end, and tokens of prompt and answer."""

    ttft_s: float
    took_s: float
    prompt_tokens: int
    num_tokens: int

    @property
    def ms_per_token(self) -> float:
        return 1000 * (self.took_s - self.ttft_s) / (self.num_tokens - 1)


class Client:
    """Asks one server. Streams are plain server-sent events: a heavier client would be what is measured."""

    def __init__(self, url: str) -> None:
        self.http = connect(url, "")
        self._model = self.http.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def engine_s(self) -> float:
        """Seconds that questions have waited in the engine and been read there, all so far."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(ENGINE_SECONDS))

    def ask(self, video: Part, question: str, num_tokens: int) -> Answer:
        """Greedily; the end token does not end the answer."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [video, {"type": "text", "text": question}]}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin_s = time.perf_counter()
        first_s = 0.0
        usage: dict[str, Any] = {}
        with event_stream(self.http, "POST", "/v1/chat/completions", json=body) as events:
            for event in events:
                if not first_s and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first_s = time.perf_counter()
                usage = event.get("usage") or usage
        end_s = time.perf_counter()
        if not first_s or usage["completion_tokens"] != num_tokens:
            raise SystemExit(f"no proper answer to {question!r}: {usage}")
        return Answer(first_s - begin_s, end_s - begin_s, usage["prompt_tokens"], num_tokens)


@dataclass(frozen=True)
class Kind:
    """A way to name a video in a question, and how often to ask so at most."""

    name: str
    part: Callable[[Path], Part]
    repeats: int
    under_load: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with a Qwen2.5-VL, instead of random 7B weights")
    parser.add_argument("--minutes", type=int, nargs="+", default=[5, 20], help="of the videos of single questions")
    parser.add_argument("--load-minutes", type=int, default=2)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--url-repeats", type=int, default=2, help="of questions that name the file as it is to vLLM")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--vllm-python", default=sys.executable, help="the Python that vLLM is installed for")
    parser.add_argument("--vllm", default="", help="more options of vllm serve, in one string")
    parser.add_argument("--x2l", default="--max-batch 64", help="more options of x2l serve, in one string")
    parser.add_argument("--only", choices=("vllm", "x2l"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = circumstances("python", sys.argv[0], bundled=False) | {
        "gpu": ask_gpu("name,driver_version,memory.total") if HAS_GPU else None
    }
    with tempfile.TemporaryDirectory(prefix="x2l-vllm-") as made:
        folder = Path(made)
        model = given.model or folder / "model"
        if given.model is None:
            write_checkpoint("qwen2_5_vl", model)
        longer = {folder / f"{minutes}.mp4": minutes for minutes in given.minutes}
        shorter = {folder / f"load-{number}.mp4": given.load_minutes for number in range(given.videos)}
        write_long_videos(longer | shorter, WIDTH, HEIGHT, FPS)
        write_long_videos({sampled(path): minutes for path, minutes in (longer | shorter).items()}, WIDTH, HEIGHT, 1)
        for name, server in (("vllm", vllm), ("x2l", x2l)):
            if given.only not in (None, name):
                continue
            with (folder / f"{name}.log").open("w+") as log:
                begin_s = time.perf_counter()
                try:
                    with server(model, folder, given, log) as (client, facts, kinds, bring):
                        result[name] = found = {"start_s": round(time.perf_counter() - begin_s, 1), **facts}
                        for path, minutes in longer.items():
                            found[f"{minutes} minutes"] = single(client, kinds, bring, path, given)
                            print(name, to_json(found[f"{minutes} minutes"]), flush=True)
                            write(result, given.out)
                        found["load"] = load(client, kinds, bring, list(shorter), given)
                        print(name, to_json(found["load"]), flush=True)
                        found["gpu_mb"] = int(ask_gpu("memory.used")) if HAS_GPU else None
                        write(result, given.out)
                finally:
                    log.seek(0)
                    if given.out:
                        given.out.with_suffix(f".{name}.log").write_text(log.read())


Bring = Callable[[Client, Path], Part]
Running = tuple[Client, dict[str, Any], Sequence[Kind], Bring]


def single(
    client: Client, kinds: Sequence[Kind], bring: Bring, path: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """The first question about a video, and others one at a time."""
    begin_s = time.perf_counter()
    answer = client.ask(bring(client, path), QUESTIONS[0], given.max_tokens)
    found: dict[str, Any] = {
        "prompt_tokens": answer.prompt_tokens,
        "prefill_ttft_s": round(time.perf_counter() - begin_s - answer.took_s + answer.ttft_s, 3),
    }
    for kind in kinds:
        client.ask(kind.part(path), QUESTIONS[0], given.max_tokens)  # what comes first is slower
        before_s = client.engine_s()
        answers = [client.ask(kind.part(path), text, given.max_tokens) for text in QUESTIONS[1 : 1 + kind.repeats]]
        found[kind.name] = {
            "ttft_ms": round(1000 * median(each.ttft_s for each in answers), 1),
            "engine_ms": round(1000 * (client.engine_s() - before_s) / len(answers), 1),
            "ms_per_token": round(median(each.ms_per_token for each in answers), 2),
        }
    return found


def load(
    client: Client, kinds: Sequence[Kind], bring: Bring, videos: Sequence[Path], given: argparse.Namespace
) -> dict[str, Any]:
    """Many questions at once, against one a video one at a time."""
    begin_s = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: client.ask(bring(client, path), QUESTIONS[0], 2), videos))
    found: dict[str, Any] = {"prefill_all_s": round(time.perf_counter() - begin_s, 2)}
    asks = [(videos[place % len(videos)], QUESTIONS[place // len(videos)]) for place in range(given.concurrency)]
    for kind in kinds:
        if not kind.under_load:
            continue
        alone: list[float] = []
        at_once: list[float] = []
        cuts: list[list[float]] = []
        for path in videos:
            client.ask(kind.part(path), QUESTIONS[0], 2)
        for _ in range(kind.repeats):
            begin_s = time.perf_counter()
            for path, text in asks[: len(videos)]:
                client.ask(kind.part(path), text, given.max_tokens)
            alone.append(len(videos) * given.max_tokens / (time.perf_counter() - begin_s))
            begin_s = time.perf_counter()
            with ThreadPoolExecutor(len(asks)) as pool:
                asked = [pool.submit(client.ask, kind.part(path), text, given.max_tokens) for path, text in asks]
                answers = [each.result() for each in asked]
            at_once.append(len(asks) * given.max_tokens / (time.perf_counter() - begin_s))
            cuts.append(quantiles([1000 * answer.ttft_s for answer in answers], n=100, method="inclusive"))
        found[kind.name] = {
            "tokens_per_s_alone": round(median(alone), 1),
            "tokens_per_s": round(median(at_once), 1),
            "ttft_ms_p50": round(median(cut[49] for cut in cuts), 1),
            "ttft_ms_p99": round(median(cut[98] for cut in cuts), 1),
        }
    return found


@contextlib.contextmanager
def x2l(model: Path, folder: Path, given: argparse.Namespace, log: IO[str]) -> Iterator[Running]:
    """This server. A video is uploaded, as its users do, and then named by its file's id."""
    ids: dict[Path, str] = {}

    def bring(client: Client, path: Path) -> Part:
        with path.open("rb") as file:
            sent = client.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": (path.name, file)})
        ids[path] = sent.raise_for_status().json()["id"]
        return part(path)

    def part(path: Path) -> Part:
        return {"type": "file", "file": {"file_id": ids[path]}}

    with serving("--model", str(model), *shlex.split(given.x2l), log=log) as live:
        yield Client(live.url), {"plan": dict(live.plan)}, [Kind("file", part, given.repeats)], bring


@contextlib.contextmanager
def vllm(model: Path, folder: Path, given: argparse.Namespace, log: IO[str]) -> Iterator[Running]:
    """vLLM, with as many frames a second and tokens a frame as this server takes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vision = json.loads((model / "config.json").read_text())["vision_config"]
    token_pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    least, most = (tokens * token_pixels for tokens in FRAME_TOKENS)
    command = [
        *(given.vllm_python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "bfloat16", "--allowed-local-media-path", str(folder)),
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}', "--mm-processor-cache-gb", "16"),
        *("--media-io-kwargs", '{"video": {"num_frames": -1, "fps": 1, "backend": "pyav"}}'),
        *("--mm-processor-kwargs", json.dumps({"min_pixels": least, "max_pixels": most})),
        *shlex.split(given.vllm),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end_s = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit("vLLM did not start; its log tells why")
            time.sleep(0.2)
        said = Path(log.name).read_text()
        sizes = {
            name: found[1].strip()
            for name, pattern in (
                ("kv_cache_tokens", r"GPU KV cache size: ([\d,]+) tokens"),
                ("attention", r"Using (\S+) (?:attention )?backend"),
            )
            if (found := re.search(pattern, said))
        }
        kinds = [
            Kind("sampled", lambda path: video_url(sampled(path), uuid=path.name), given.repeats),
            Kind("url", video_url, given.url_repeats, under_load=False),
        ]
        facts = {**httpx.get(f"{url}/version").json(), "command": command[3:], **sizes}
        yield Client(url), facts, kinds, lambda _, path: video_url(path)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def video_url(path: Path, **more: str) -> Part:
    return {"type": "video_url", "video_url": {"url": path.as_uri()}, **more}


def sampled(path: Path) -> Path:
    """Where a video of as many minutes with one frame a second is."""
    return path.with_suffix(".1fps.mp4")


if __name__ == "__main__":
    main()
