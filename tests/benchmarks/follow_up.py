"""How soon a follow-up question on a ready video starts answering, against the time that its prefill took.

``python tests/benchmarks/follow_up.py [--chunks 16 64] [--repeats 30] [--out RESULT.json]``

Serves one mp4 of each length with ``x2l serve``, asks every question once to warm up, then one at a time, streamed,
with default settings. TTFT is the time from sending the request to the first piece of content, seen by the client.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from common import Video, circumstances, make_videos, parser, print_table, write
from live_server import Job, ask, request, serving, upload
from openai import OpenAI

MOST_TTFT_MS = {16: 80.0}
LEAST_RATIO = {64: 20.0}


def ttft_ms(client: OpenAI, job: Job) -> tuple[float, dict[str, Any]]:
    """Milliseconds to the first content, and the stream's ``timings_ms`` and usage."""
    begin_s = time.perf_counter()
    first_s = None
    facts: dict[str, Any] = {}
    with client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **request(job)) as stream:
        for event in stream:
            if first_s is None and event.choices and event.choices[0].delta.content:
                first_s = time.perf_counter()
            facts |= (event.model_extra or {}).get("x2l") or {}
            facts |= event.usage.model_dump() if event.usage is not None else {}
    if first_s is None:
        raise SystemExit(f"no content in the answer to {job.question!r}")
    return (first_s - begin_s) * 1000, facts


def measure(client: OpenAI, video: Video, chunks: int, repeats: int) -> dict[str, Any]:
    file = upload(client, [video])[video.path]
    jobs = [Job(file.id, question["question"]) for question in video.questions]
    for job in jobs:
        ask(client, job)
    runs = [ttft_ms(client, job) for job in itertools.islice(itertools.cycle(jobs), repeats)]
    cuts = quantiles([taken for taken, _ in runs], n=20, method="inclusive")
    p50, p95 = cuts[9], cuts[18]
    facts = [facts for _, facts in runs]
    prefill_s = file.video["prefill_s"]
    result = {
        "chunks": chunks,
        "repeats": repeats,
        "ttft_ms_p50": round(p50, 1),
        "ttft_ms_p95": round(p95, 1),
        "prefill_s": round(prefill_s, 2),
        "prefill_over_ttft": round(prefill_s * 1000 / p50, 1),
        "cached_tokens": facts[0]["prompt_tokens_details"]["cached_tokens"],
        "mixed_kv_tokens": facts[0]["kv_tokens"]["mixed"],
        "prompt_tokens": facts[0]["prompt_tokens"],
        "server_ms_p50": {
            name: round(sorted(fact["timings_ms"][name] for fact in facts)[repeats // 2], 1)
            for name in ("score", "reload", "prefill", "decode")
        },
    }
    most, least = MOST_TTFT_MS.get(chunks), LEAST_RATIO.get(chunks)
    met = (most is None or p50 <= most) and (least is None or result["prefill_over_ttft"] >= least)
    return result | {
        "met": met and all(f["prompt_tokens_details"]["cached_tokens"] == f["kv_tokens"]["mixed"] for f in facts)
    }


def main() -> None:
    arguments = parser(__doc__, seeds="500")
    arguments.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    arguments.add_argument("--repeats", type=int, default=30)
    given = arguments.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for chunks in given.chunks:
            # Made before the server starts, so that nothing else runs beside the prefill.
            videos = make_videos(Path(folder), given.seeds[:1], chunks)
            with serving() as live, live.client() as client:
                results.append(measure(client, videos[0], chunks, given.repeats))
    columns = [name for name in results[0] if name not in ("chunks", "server_ms_p50")]
    print_table("chunks", [name[:10] for name in columns], {str(r["chunks"]): [r[c] for c in columns] for r in results})
    write(circumstances(given) | {"results": results}, given.out)


if __name__ == "__main__":
    main()
