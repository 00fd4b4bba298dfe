"""What the records of a run come to: shares with intervals, means and medians, by length, method and type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from server.bench.interval import share
from server.bench.records import Record
from server.bench.reply import PHASES
from server.bench.rows import EVERY_METHOD

TYPES = ("code", "exist", "order", "count", "time", "object", "multi")
RANKS = (1, 2, 3, 6)


def summarize(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One entry a length, shortest first, with the methods in the order of EVERY_METHOD."""
    by_length: dict[int, dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda record: record.chunks):
        by_length.setdefault(record.chunks, {}).setdefault(record.method, []).append(record)
    return [
        {
            "chunks": chunks,
            "videos": len({record.seed for of_method in rows.values() for record in of_method}),
            "video_prefill_s": _prefill_s(record for of_method in rows.values() for record in of_method),
            "methods": {
                method.name: {"family": method.family, "at_default": method.at_default} | _row(rows[method.name])
                for method in EVERY_METHOD
                if method.name in rows
            },
        }
        for chunks, rows in by_length.items()
    ]


def recall(ranks: Sequence[int], count: int) -> float:
    """Of the chunks that hold an answer and have these places (from 0) in the order of the scores: the share that is
    among the ``count`` best, of as many as can be."""
    return sum(rank < count for rank in ranks) / min(count, len(ranks))


def recall_at(record: Record, count: int) -> float | None:
    """The same; None for a question whose answer is nowhere, and where no scores chose."""
    return recall(record.ranks, count) if record.ranks else None


def _row(records: Sequence[Record]) -> dict[str, Any]:
    answered = [record for record in records if record.error is None]
    pointed = [record for record in answered if record.reloaded and record.truth]
    found = [len(set(record.reloaded) & set(record.truth)) for record in pointed]
    kinds = {kind: [record.right for record in records if record.type == kind] for kind in TYPES}
    return {
        "accuracy": _share_of([record.right for record in records]),
        "by_type": {kind: _share_of(right) for kind, right in kinds.items() if right},
        "errors": len(records) - len(answered),
        # No cache is empty: a server that tells nothing has no figures.
        "kv_tokens": _mean((record.kv_tokens or None for record in answered), 1),
        "kv_nbytes": _mean((record.kv_nbytes or None for record in answered), 0),
        "reload_nbytes": _mean((record.reload_nbytes if record.kv_tokens else None for record in answered), 0),
        "recall": {str(count): _mean(recall_at(record, count) for record in answered) for count in RANKS},
        "span_precision": _mean(n / len(record.reloaded) for n, record in zip(found, pointed, strict=True)),
        "span_recall": _mean(n / len(record.truth) for n, record in zip(found, pointed, strict=True)),
        "contained": _share_of([record.contained for record in answered if record.contained is not None]),
        "median_ms": {phase: _median_ms(answered, phase) for phase in PHASES},
    }


def _prefill_s(records: Iterable[Record]) -> float | None:
    """The mean over the videos, as the engine prefilled them."""
    return _mean({record.seed: record.prefill_s for record in records if record.prefill_s}.values(), 2)


def _share_of(values: Sequence[bool]) -> dict[str, Any]:
    return share(sum(values), len(values))


def _median_ms(records: Iterable[Record], phase: str) -> float | None:
    times = [record.times_ms[phase] for record in records if record.times_ms and phase in record.times_ms]
    return round(median(times), 1) if times else None


def _mean(values: Iterable[float | None], digits: int = 4) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return round(fmean(there), digits) if there else None


def uniform_at(methods: Mapping[str, Any], kv_tokens: float, value: Callable[[Any], float]) -> float | None:
    """What uniform compression has at ``kv_tokens``: linear between the ratios measured; None outside them."""
    rows = [row for row in methods.values() if row["family"] == "uniform" and row["kv_tokens"] is not None]
    tokens = sorted(row["kv_tokens"] for row in rows)
    if not tokens or not tokens[0] <= kv_tokens <= tokens[-1]:
        return None
    values = [value(row) for row in sorted(rows, key=lambda row: row["kv_tokens"])]
    return float(np.interp(kv_tokens, tokens, values))
