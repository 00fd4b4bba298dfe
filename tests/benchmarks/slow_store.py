"""What a slow store does to those who do not read from it: their time between tokens, with and without a delay.

``python tests/benchmarks/slow_store.py [--delay-ms 50] [--questions 300] [--out RESULT.json]``

A server stores in a real Redis behind a proxy that delays every request. One client streams answers from H-KVs alone,
one after the other, while others ask at a fixed rate for answers that re-load L-KVs. The same is measured without the
delay, before and after, and the growth is against the mean of both.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import circumstances, make_videos, parser, print_table, write
from live_server import Job, Live, ask, request, serving, upload

sys.path.insert(0, str(Path(__file__).parents[1]))

from redis_servers import RedisServer
from slow_proxy import SlowProxy, slow_proxy

MOST_GROWTH = 0.20
ASKERS = 3
INTERVAL_S = 0.5


def gaps_ms(live: Live, jobs: list[Job], count: int) -> list[float]:
    """Times between the pieces of ``count`` streamed answers."""
    gaps = []
    with live.client() as client:
        for index in range(count):
            last_s = None
            with client.chat.completions.create(stream=True, **request(jobs[index % len(jobs)])) as stream:
                for event in stream:
                    if event.choices and event.choices[0].delta.content:
                        now_s = time.perf_counter()
                        if last_s is not None:
                            gaps.append((now_s - last_s) * 1000)
                        last_s = now_s
    return gaps


def measure(live: Live, streamed: list[Job], asked: list[Job], count: int) -> dict[str, Any]:
    """Streams while others re-load."""
    over = threading.Event()
    replies: list[Any] = []

    def keep_asking(offset: int) -> None:
        with live.client() as client:
            number = offset
            while not over.wait(INTERVAL_S):
                replies.append(ask(client, asked[number % len(asked)]))
                number += ASKERS

    threads = [threading.Thread(target=keep_asking, args=(offset,)) for offset in range(ASKERS)]
    for thread in threads:
        thread.start()
    try:
        gaps = gaps_ms(live, streamed, count)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return {
        "gaps": len(gaps),
        "mean_ms": round(mean(gaps), 2),
        "median_ms": round(median(gaps), 2),
        "others_asked": len(replies),
        "others_reload_ms_median": round(median(reply.x2l["timings_ms"]["reload"] for reply in replies), 1),
        "others_degraded": sum(reply.x2l["degraded"] for reply in replies),
    }


def main() -> None:
    arguments = parser(__doc__, seeds="500")
    arguments.add_argument("--delay-ms", type=float, default=50.0)
    arguments.add_argument("--questions", type=int, default=300)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="x2l-benchmark-") as folder:
        video = make_videos(Path(folder), given.seeds[:1])[0]
        data = Path(folder) / "redis"
        data.mkdir()
        with RedisServer(data) as redis, slow_proxy(redis.port, 0.0) as proxy:
            options = ("--store", f"redis://127.0.0.1:{proxy.port}", "--store-cache-bytes", "0")
            with serving(*options) as live, live.client() as client:
                file_id = upload(client, [video])[video.path].id
                questions = [question["question"] for question in video.questions]
                streamed = [Job(file_id, question, {"mode": "high"}) for question in questions]
                asked = [Job(file_id, question, {"reload": 3}) for question in questions]
                runs = run_all(live, proxy, streamed, asked, given)
    quick = mean(runs[name]["mean_ms"] for name in ("before", "after"))
    growth = runs["delayed"]["mean_ms"] / quick - 1
    columns = list(runs["delayed"])
    print_table("", [name[:10] for name in columns], {name: list(run.values()) for name, run in runs.items()})
    print(f"growth of the mean time between tokens: {growth:+.1%} (at most {MOST_GROWTH:.0%})")
    result = {"runs": runs, "growth": round(growth, 4), "most": MOST_GROWTH, "met": growth < MOST_GROWTH}
    write(circumstances(given) | {"result": result}, given.out)
    raise SystemExit(not result["met"])


def run_all(live: Live, proxy: SlowProxy, streamed: list[Job], asked: list[Job], given: Any) -> dict[str, Any]:
    gaps_ms(live, [*streamed[:5], *asked[:5]], 10)  # warm
    runs = {}
    for name, delay_ms in (("before", 0.0), ("delayed", given.delay_ms), ("after", 0.0)):
        proxy.delay_s = delay_ms / 1000
        runs[name] = measure(live, streamed, asked, given.questions)
    return runs


if __name__ == "__main__":
    main()
