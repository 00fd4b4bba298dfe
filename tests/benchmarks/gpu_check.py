"""The same engine on the CPU and on a GPU: are the answers the same?

``python tests/benchmarks/gpu_check.py [--questions 100] [--out RESULT.json]``

Makes a few mp4 videos and runs the engine in this process, with nothing of HTTP: on the CPU in float32, then, where
there is a GPU, on it in float32 and bfloat16. Every time the videos are prefilled anew and the same questions asked,
greedy, several at once. Prints JSON; the exit code is 1 unless the GPU's float32 answers are the CPU's and its
bfloat16 accuracy lies within 1 point. Without a GPU only the CPU is run, and the result says so.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import Tally, Video, circumstances, make_videos, parser, to_json, write

from compression.select import Dial
from kvstore.memory import MemoryStore
from server.bench.grade import is_right
from server.engine.engine import Engine
from server.engine.options import EngineOptions
from server.engine.request import Delta, Request, SamplingParams
from server.models.base import Turn
from server.models.registry import Device, DType, load_model
from server.video.reader import Sampling

SETUPS: tuple[tuple[Device, DType], ...] = (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16"))
TIMEOUT_S = 300.0
MAX_TOKENS = 64
MOST_POINTS = 0.01


class Answer:
    """Collects the deltas of one request."""

    def __init__(self) -> None:
        self.text = ""
        self._last: Delta | None = None
        self._ended = threading.Event()

    def on_delta(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.final:
            self._last = delta
            self._ended.set()

    def wait(self) -> str:
        if not self._ended.wait(TIMEOUT_S):
            raise SystemExit("an answer did not end")
        if self._last is not None and self._last.error is not None:
            raise self._last.error
        return self.text


def prefill(engine: Engine, video: Video, folder: Path) -> str:
    """The file id of the processed video."""
    copy = folder / f"upload-{video.seed}.mp4"  # the library takes its file away
    shutil.copy(video.path, copy)
    record = engine.library.create(
        copy,
        filename=video.path.name,
        purpose="user_data",
        sampling=Sampling(1.0),
        tenant="",
        expires_after_s=None,
        source="upload",
    )
    end_s = time.monotonic() + TIMEOUT_S
    while record.status == "uploaded" and time.monotonic() < end_s:
        time.sleep(0.02)
        record = engine.library.get(record.id, "") or record
    if record.status != "processed":
        raise SystemExit(f"{video.path.name}: {record.status}, {record.status_details}")
    return record.id


def ask_all(
    device: Device, dtype: DType, asked: list[tuple[Video, dict[str, Any]]], folder: Path, concurrency: int
) -> tuple[list[str], dict[str, float]]:
    """The answers in order, and how long prefilling and asking took."""
    engine = Engine(load_model("tiny", device=device, dtype=dtype), MemoryStore(), EngineOptions(max_batch=concurrency))
    engine.start()
    try:
        begin_s = time.monotonic()
        videos = {video.seed: video for video, _ in asked}
        ids = {seed: prefill(engine, video, folder) for seed, video in videos.items()}
        prefilled_s = time.monotonic()
        answers: list[Answer] = []
        for number, (video, question) in enumerate(asked):
            # All at once would be more than the queue takes.
            if number >= concurrency:
                answers[number - concurrency].wait()
            answers.append(Answer())
            turns = (Turn("user", question["question"]),)
            params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
            engine.submit(Request(str(number), turns, params, (ids[video.seed],), "", Dial()), answers[-1].on_delta)
        texts = [answer.wait() for answer in answers]
        ended_s = time.monotonic()
    finally:
        engine.close()
    return texts, {"prefill_s": round(prefilled_s - begin_s, 2), "questions_s": round(ended_s - prefilled_s, 2)}


def main() -> None:
    arguments = parser(__doc__, seeds="600-606")
    arguments.add_argument("--chunks", type=int, default=16)
    arguments.add_argument("--questions", type=int, default=100)
    arguments.add_argument("--concurrency", type=int, default=8)
    given = arguments.parse_args()
    setups = SETUPS if torch.cuda.is_available() else SETUPS[:1]
    runs: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = make_videos(Path(folder), given.seeds, given.chunks)
        asked = [(video, question) for video in videos for question in video.questions][: given.questions]
        for device, dtype in setups:
            name = f"{device} {dtype}"
            texts[name], times = ask_all(device, dtype, asked, Path(folder), given.concurrency)
            tally = Tally()
            for (_, question), text in zip(asked, texts[name], strict=True):
                tally.add(question["type"], is_right(question["type"], question["answer"], text))
            differ = [
                {"question": question["question"], "answer": question["answer"], "cpu": reference, name: text}
                for (_, question), reference, text in zip(asked, texts["cpu float32"], texts[name], strict=True)
                if text != reference
            ]
            runs[name] = {
                "right_of_asked": tally.counts(),
                "accuracy": round(tally.share(), 4),
                "differ_from_cpu": len(differ),
                "differences": differ[:10],
                **times,
            }
    result: dict[str, Any] = circumstances(given) | {"runs": runs}
    ok = True
    if len(setups) == 1:
        result["skipped"] = "no GPU here: only the CPU was run"
    else:
        result["gpu"] = torch.cuda.get_device_name()
        gap = abs(runs["cuda bfloat16"]["accuracy"] - runs["cpu float32"]["accuracy"])
        ok = runs["cuda float32"]["differ_from_cpu"] == 0 and gap <= MOST_POINTS + 1e-9
        result["ok"] = ok
    print(to_json(result))
    write(result, given.out)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
