"""Many clients asking at once, for minutes: no error, no mixed-up answer, no leak.

``python tests/benchmarks/soak.py [--clients 8] [--minutes 2] [--out RESULT.json]``

First every question is asked alone; that answer (greedy) is the one that it must get ever after. Then the clients ask
questions about different videos in random order, streamed or not; of the streams some are left after the first piece
of content. Prints JSON; the exit code is 1 if anything failed, an answer differed, the server's memory grew by 20 MB
or more from minute 1 to the last, or it holds more file descriptors afterwards than before.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil
from common import circumstances, make_videos, parser, to_json, write
from live_server import Job, Live, ask, request, serving, upload
from openai import OpenAI

MOST_GROWTH_MB = 20.0
SETTLE_S = 10.0
DIALS: tuple[dict[str, Any], ...] = ({}, {"reload": 1}, {"mode": "low"}, {"reload": 0})


class Client(threading.Thread):
    """Asks until ``end_s`` (monotonic). ``counts`` tells what was done, ``findings`` what went wrong."""

    def __init__(self, live: Live, expected: list[tuple[Job, str]], seed: int, end_s: float) -> None:
        super().__init__(name=f"client {seed}")
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self._live, self._expected, self._rng, self._end_s = live, expected, Random(seed), end_s

    def run(self) -> None:
        with self._live.client() as client:
            while time.monotonic() < self._end_s:
                job, answer = self._rng.choice(self._expected)
                way = self._rng.choice(("whole", "streamed", "streamed", "aborted"))
                self.counts[way] += 1
                try:
                    got = ask(client, job).text if way == "whole" else _stream(client, job, abort=way == "aborted")
                except Exception as error:
                    self.findings.append(f"{way} {job}: {error!r}")
                    continue
                if got != answer[: len(got)] if way == "aborted" else got != answer:
                    self.findings.append(f"{way} {job}: {got!r}, alone {answer!r}")


def _stream(client: OpenAI, job: Job, *, abort: bool) -> str:
    """The streamed text; with ``abort`` the connection is closed at the first content."""
    text = ""
    with client.chat.completions.create(stream=True, **request(job)) as stream:
        for event in stream:
            text += (event.choices[0].delta.content or "") if event.choices else ""
            if abort and text:
                return text
    return text


def sample(server: psutil.Process, clients: list[Client]) -> list[tuple[float, float, int]]:
    """(seconds since the start, resident MB, file descriptors) twice a second while the clients are at it."""
    begin_s = time.monotonic()
    samples = []
    while any(client.is_alive() for client in clients):
        samples.append((time.monotonic() - begin_s, server.memory_info().rss / 1e6, server.num_fds()))
        time.sleep(0.5)
    return samples


def fds_at_rest(server: psutil.Process, at_most: int | None = None) -> int:
    """Open file descriptors once no connection is left, or SETTLE_S later."""
    end_s = time.monotonic() + SETTLE_S
    while time.monotonic() < end_s:
        listening_only = len(server.net_connections("tcp")) == 1
        if listening_only and (at_most is None or server.num_fds() <= at_most):
            break
        time.sleep(0.2)
    return server.num_fds()


def measure(live: Live, expected: list[tuple[Job, str]], num_clients: int, minutes: float) -> dict[str, Any]:
    server = psutil.Process(live.pid)
    fds_before = fds_at_rest(server)
    end_s = time.monotonic() + 60 * minutes
    clients = [Client(live, expected, seed, end_s) for seed in range(num_clients)]
    for client in clients:
        client.start()
    samples = sample(server, clients)
    fds_after = fds_at_rest(server, at_most=fds_before)
    # The last quarter of each minute: single samples swing by what is in flight.
    first = median(rss for at_s, rss, _ in samples if 45 * minutes / 2 <= at_s < 60 * minutes / 2)
    last = median(rss for at_s, rss, _ in samples if at_s >= 60 * minutes - 15 * minutes / 2)
    findings = [finding for client in clients for finding in client.findings]
    return {
        "requests": dict(sum((client.counts for client in clients), Counter())),
        "findings": findings[:20],
        "num_findings": len(findings),
        "rss_mb": {
            "first_half_end": round(first, 1),
            "second_half_end": round(last, 1),
            "growth": round(last - first, 1),
            "peak": round(max(rss for _, rss, _ in samples), 1),
        },
        "fds": {"before": fds_before, "most": max(fds for *_, fds in samples), "after": fds_after},
        "ok": not findings and last - first < MOST_GROWTH_MB and fds_after <= fds_before,
    }


def main() -> None:
    arguments = parser(__doc__, seeds="500-503")
    arguments.add_argument("--chunks", type=int, nargs="+", default=[4, 16], help="lengths of the videos, in turn")
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--minutes", type=float, default=2.0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = []
        for number, seed in enumerate(given.seeds):
            videos += make_videos(Path(folder), [seed], given.chunks[number % len(given.chunks)])
        with serving() as live:
            with live.client() as client:
                files = upload(client, videos)
                questions = [
                    (files[video.path].id, question["question"]) for video in videos for question in video.questions
                ]
                jobs = [Job(file_id, text, DIALS[i % len(DIALS)]) for i, (file_id, text) in enumerate(questions)]
                expected = [(job, ask(client, job).text) for job in jobs]
            result = measure(live, expected, given.clients, given.minutes)
    result = circumstances(given) | result
    print(to_json(result))
    write(result, given.out)
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
