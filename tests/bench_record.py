"""A record of the quality benchmark, to be varied."""

from __future__ import annotations

from server.bench.records import Record

RECORD = Record(
    method="low",
    chunks=8,
    seed=1,
    index=0,
    type="code",
    answer="K7X",
    reply="K7X",
    right=True,
    error=None,
    truth=(3,),
    reloaded=(0, 3),
    ranks=(1,),
    contained=True,
    kv_tokens=100,
    kv_nbytes=1000,
    reload_nbytes=500,
    times_ms={"score": 1.5},
    prefill_s=2.0,
)
