"""Many more videos than the device pool holds: is every question answered as if all were resident?

``python tests/benchmarks/many_videos.py [--seeds 700-899] [--holds 20] [--out RESULT.json]``

Uploads every mp4 (one chunk) and asks for one code shown in each of them on a server whose pool holds all: what only
that video's own L-KVs tell, so that KVs of another video, or stale ones, cannot pass for them. Then a server with a
pool for ``--holds`` of them, on the same store, is asked the same in random order, several at a time, twice. Every
answer must be true and the same as the first server's, token by token, and its books must balance.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import circumstances, make_videos, parser, print_table, write
from live_server import Job, Reply, ask
from openai import OpenAI

from server.app import Backend, open_backend
from server.bench.grade import is_right
from server.config import Settings
from server.serving import running

CONCURRENCY = 8


def settings(store: str, **options: Any) -> Settings:
    return Settings(store=store, port=0, log_level="warning", **options)


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def prepare(url: str, folder: Path, seeds: Sequence[int]) -> tuple[list[Job], list[dict[str, Any]], int]:
    """Uploads all; one job a video, the questions with their answers, and the bytes of the largest video's H-KVs."""
    jobs, asked, largest = [], [], 0
    with client_of(url) as client:
        for number, video in enumerate(make_videos(folder, seeds, chunks=1)):
            file = client.files.create(file=video.path, purpose="user_data")
            file = client.files.wait_for_processing(file.id, poll_interval=0.05)
            codes = [question for question in video.questions if question["type"] == "code"]
            question = codes[number % len(codes)]
            jobs.append(Job(file.id, question["question"]))
            asked.append(question)
            largest = max(largest, file.video["bytes"]["high"])
    return jobs, asked, largest


def ask_in_turn(url: str, jobs: Sequence[Job], order: Sequence[int]) -> tuple[list[Reply], float]:
    """The replies in the order of ``jobs``, asked in ``order``, and how long it took."""
    begin_s = time.perf_counter()
    with client_of(url) as client, ThreadPoolExecutor(CONCURRENCY) as threads:
        asked = dict(zip(order, threads.map(lambda index: ask(client, jobs[index]), order), strict=True))
    return [asked[index] for index in range(len(jobs))], time.perf_counter() - begin_s


def books(backend: Backend, budget_nbytes: int) -> dict[str, Any]:
    """Raises PoolError unless they balance."""
    pool = backend.engine._pool
    pool.check_integrity()
    return {
        "resident_videos": len(pool),
        "resident_bytes": pool.nbytes,
        "budget_bytes": budget_nbytes,
        "leases": pool.num_leases,
    }


def main() -> None:
    arguments = parser(__doc__, seeds="700-899")
    arguments.add_argument("--holds", type=int, default=20)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="x2l-benchmark-") as folder:
        store = f"disk:{folder}/store"
        roomy = settings(store)
        backend = open_backend(roomy)
        with running(roomy, backend) as url:
            jobs, asked, largest = prepare(url, Path(folder), given.seeds)
            expected, roomy_s = ask_in_turn(url, jobs, range(len(jobs)))
            budget = given.holds * (largest + backend.model.prefix().nbytes)
        tight = settings(store, gpu_kv_budget=budget)
        backend = open_backend(tight)
        rounds, seen = [], []
        with running(tight, backend) as url:
            for number in range(2):
                order = random.Random(number).sample(range(len(jobs)), len(jobs))
                replies, taken_s = ask_in_turn(url, jobs, order)
                rounds.append(taken_s)
                seen.append(sum(a.text == b.text for a, b in zip(replies, expected, strict=True)))
                assert not any(reply.x2l["degraded"] for reply in replies)
            accounts = books(backend, budget)
    wrong = [
        {"seed": seed, **{name: one[name] for name in ("type", "question", "answer")}, "reply": reply.text}
        for seed, one, reply in zip(given.seeds, asked, expected, strict=True)
        if not is_right(one["type"], one["answer"], reply.text)
    ]
    met = not wrong and seen == [len(jobs)] * 2 and accounts["leases"] == 0 and accounts["resident_bytes"] <= budget
    result = {
        "videos": len(jobs),
        "pool_holds": given.holds,
        "same_answers": seen,
        "true_answers_when_all_resident": len(jobs) - len(wrong),
        "questions_per_s_all_resident": round(len(jobs) / roomy_s, 2),
        "questions_per_s": [round(len(jobs) / taken_s, 2) for taken_s in rounds],
        "books": accounts,
        "wrong_when_all_resident": wrong,
        "met": met,
    }
    print_table(
        "",
        ["value"],
        {name: [str(value)] for name, value in result.items() if name not in ("books", "wrong_when_all_resident")},
    )
    write(circumstances(given) | {"result": result}, given.out)
    raise SystemExit(not met)


if __name__ == "__main__":
    main()
