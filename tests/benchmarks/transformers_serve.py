"""``transformers serve``, transformers' own OpenAI-compatible server, asked about a video over HTTP; for ``peers.py``.

It keeps nothing of a video: every question reads, resizes and prefills it again. It needs more than this project:
``pip install 'transformers[serving]' requests torchvision torchcodec``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from openai import OpenAI

from server.models.families.patches import FRAME_TOKENS

NEEDS = ("accelerate", "fastapi", "requests", "torchcodec", "torchvision", "uvicorn")
ITS_FRAMES = 32
"""How many frames it takes of any video when a request does not say (transformers 5.17)."""
READY_S, LOG_S = 180.0, 2.0


class NoAnswerError(Exception):
    """It did not start, or a question got no answer; the message says why."""


def why_not() -> str | None:
    """What keeps it from being run at all."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def version() -> str:
    names = ("transformers", "torchvision", "torchcodec")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def samplings(model: Path, minutes: int) -> dict[str, dict[str, int]]:
    """What to ask it for: what it does by itself, and the frames that this server takes, in this server's size."""
    vision = json.loads((model / "config.json").read_text())["vision_config"]
    token_pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    least, most = (tokens * token_pixels for tokens in FRAME_TOKENS)
    return {
        "its_frames": {"num_frames": ITS_FRAMES},
        "same_frames": {"num_frames": 60 * minutes, "min_pixels": least, "max_pixels": most},
    }


class TransformersServe:
    """The server in a process of its own, there from the first question on; after one that failed, a new one is. A
    question and its answer may take ``limit_s``."""

    def __init__(self, model: Path, scratch: Path, limit_s: float) -> None:
        self._model, self._scratch, self._limit_s = model, scratch, limit_s
        self._log = scratch / "transformers-serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def __enter__(self) -> TransformersServe:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def measure(self, video: Path, minutes: int, question: str, num_tokens: int, repeats: int) -> dict[str, Any]:
        """Every sampling of this video; one that fails has an ``error`` instead of figures."""
        sounding = self._scratch / "sounding.mp4"
        add_sound(video, sounding)
        found: dict[str, Any] = {}
        for name, sampling in samplings(self._model, minutes).items():
            found[name] = {**sampling, "frames_per_s": round(sampling["num_frames"] / (60 * minutes), 3)}
            try:
                answers = [self._ask(sounding, sampling, question, num_tokens) for _ in range(1 + repeats)]
                found[name] |= medians(answers[1:])  # what comes first is slower
            except NoAnswerError as error:
                self._stop()
                found[name]["error"] = str(error)
        sounding.unlink()
        return found

    def _ask(self, video: Path, sampling: dict[str, int], question: str, num_tokens: int) -> dict[str, float]:
        process = self._started()
        begin_s = time.monotonic()
        # It prepares a video in the thread that speaks HTTP: nothing but its end makes it stop.
        timer = threading.Timer(self._limit_s, process.kill)
        timer.start()
        try:
            return stream(self._url, str(self._model), video, sampling, question, num_tokens)
        except Exception as error:  # of whatever kind: it is a finding, and there are other lengths
            if time.monotonic() - begin_s >= self._limit_s:
                raise NoAnswerError(f"no whole answer within {self._limit_s:g} s") from error
            raise NoAnswerError(f"{type(error).__name__}: {error} {self._said()}") from error
        finally:
            timer.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        start = "from transformers.cli.transformers import main; main()"
        command = [sys.executable, "-c", start, "serve", str(self._model), "--host", "127.0.0.1", "--port", str(port)]
        found = os.pathsep.join([*ffmpeg(self._scratch / "ffmpeg"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **offline, "LD_LIBRARY_PATH": found},
                start_new_session=True,
            )
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s and self._process.poll() is None:
            try:  # it answers once the model is there
                if httpx.get(f"{self._url}/health").status_code == 200:
                    return self._process
            except httpx.TransportError:  # not yet
                time.sleep(0.2)
        raise NoAnswerError(f"it did not start {self._said()}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _said(self) -> str:
        """The last error in its log, which comes a little after the answer: that says only that there was one."""
        end_s = time.monotonic() + LOG_S
        while True:
            lines = self._log.read_text(errors="replace").splitlines()
            if errors := [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]:
                return f"(its log: {errors[-1].strip()})"
            if time.monotonic() > end_s:
                return "(its log has no error)"
            time.sleep(0.1)


def stream(
    url: str, model: str, video: Path, sampling: dict[str, int], question: str, num_tokens: int
) -> dict[str, float]:
    """One streamed answer. Raises ValueError for one that cannot be timed, and what the client does."""
    parts: list[Any] = [  # of URLs it takes paths and http(s) only, neither file: nor data:
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": question},
    ]
    begin_s = time.perf_counter()
    prepared_s = first_s = 0.0
    usage: Any = None
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=None) as client:
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": parts}],
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body={"chat_template_kwargs": sampling},
        ):
            usage = chunk.usage or usage
            # It says who speaks when the video has become tensors, before the prefill.
            prepared_s = prepared_s or time.perf_counter()
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text and "<|im_start|>" in text:
                raise ValueError("it gave the prompt back: when the first token came cannot be told")
            if text and not first_s:
                first_s = time.perf_counter()
    end_s = time.perf_counter()
    if usage is None or not first_s:
        raise ValueError("the answer is empty or was cut off")
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "prepared_s": prepared_s - begin_s,
        "ttft_s": first_s - begin_s,
        "tokens_per_s": (usage.completion_tokens - 1) / max(end_s - first_s, 1e-9),
    }


def medians(answers: list[dict[str, float]]) -> dict[str, float]:
    found = {name: statistics.median(answer[name] for answer in answers) for name in answers[0]}
    return {name: int(value) if name.endswith("tokens") else round(value, 4) for name, value in found.items()}


def add_sound(video: Path, target: Path) -> None:
    """A copy with a second of silence. Of every video transformers 5.17 also decodes the sound, which Qwen2.5-VL cannot
    hear, and it fails at one that has none."""
    with av.open(str(video)) as given, av.open(str(target), "w") as made:
        pictures = given.streams.video[0]
        copied = made.add_stream_from_template(pictures)
        sound = made.add_stream("aac", rate=16_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 16_000, 0
        made.mux([*sound.encode(silence), *sound.encode(None)])
        for packet in given.demux(pictures):
            if packet.dts is not None:  # the last one is empty
                packet.stream = copied
                made.mux(packet)


def ffmpeg(folder: Path) -> list[str]:
    """Folders in which torchcodec, which brings no FFmpeg, finds the one of PyAV's wheel under its usual names; none
    where PyAV uses the system's, as then torchcodec can too."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if not libraries.is_dir():
        return []
    folder.mkdir(exist_ok=True)
    for path in libraries.iterdir():
        if found := re.match(r"(lib(?:av|sw)[a-z]+)-\w+(\.so\.\d+)", path.name):
            link = folder / (found[1] + found[2])
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return [str(folder), str(libraries)]
