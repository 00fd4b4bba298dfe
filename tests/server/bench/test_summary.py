"""The arithmetic of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_record import RECORD

from server.bench.summary import recall_at, summarize, uniform_at
from server.bench.targets import check


@pytest.mark.parametrize(
    ("truth", "ranks", "at_1", "at_3"),
    [
        ((3,), (0,), 1.0, 1.0),
        ((3,), (2,), 0.0, 1.0),
        ((3, 5), (0, 1), 1.0, 1.0),  # one place for two: half of them is all that can be
        ((3, 5), (1, 9), 0.0, 0.5),
        ((1, 2, 3, 4), (0, 2, 1, 7), 1.0, 1.0),
    ],
)
def test_recall(truth: tuple[int, ...], ranks: tuple[int, ...], at_1: float, at_3: float) -> None:
    record = replace(RECORD, truth=truth, ranks=ranks)
    assert (recall_at(record, 1), recall_at(record, 3)) == (at_1, at_3)


def test_recall_is_of_questions_with_a_place_and_of_scores_that_chose() -> None:
    assert recall_at(replace(RECORD, truth=(), ranks=()), 3) is None
    assert recall_at(replace(RECORD, ranks=None), 3) is None


def test_a_row() -> None:
    records = [
        RECORD,
        replace(RECORD, index=1, right=False, reloaded=(0, 1), ranks=(4,), contained=False, times_ms={"score": 2.5}),
        replace(RECORD, index=2, type="exist", truth=(), ranks=(), contained=None, times_ms=None, prefill_s=None),
        replace(RECORD, index=3, type="order", right=False, error="APIError: no", kv_tokens=0, reloaded=(), ranks=None),
    ]
    assert summarize([]) == []
    (length,) = summarize(records)
    assert (length["chunks"], length["videos"], length["video_prefill_s"]) == (8, 1, 2.0)
    row = length["methods"]["low"]
    assert (row["accuracy"]["right"], row["accuracy"]["asked"]) == (2, 4)  # an error counts as wrong
    assert row["errors"] == 1
    assert {kind: (one["right"], one["asked"]) for kind, one in row["by_type"].items()} == {
        "code": (1, 2),
        "exist": (1, 1),
        "order": (0, 1),
    }
    assert row["kv_tokens"] == 100  # of those that were answered
    assert (row["recall"]["1"], row["recall"]["2"]) == (0.0, 0.5)
    assert (row["span_precision"], row["span_recall"]) == (0.25, 0.5)
    assert (row["contained"]["right"], row["contained"]["asked"]) == (1, 2)
    assert row["median_ms"] == {"score": 2.0, "reload": None, "prefill": None, "decode": None}


def test_what_a_server_does_not_tell_is_left_open() -> None:
    (length,) = summarize([replace(RECORD, kv_tokens=0, kv_nbytes=0, reload_nbytes=0, times_ms={}, prefill_s=0.0)])
    row = length["methods"]["low"]
    assert row["kv_tokens"] is row["kv_nbytes"] is row["reload_nbytes"] is length["video_prefill_s"] is None


def test_lengths_and_methods_stand_in_order() -> None:
    records = [replace(RECORD, chunks=chunks, method=name) for chunks in (16, 8) for name in ("random", "high", "low")]
    summary = summarize(records)
    assert [part["chunks"] for part in summary] == [8, 16]
    assert [list(part["methods"]) for part in summary] == [["low", "high", "random"]] * 2


def methods(**shares: tuple[float, float]) -> dict[str, dict[str, object]]:
    """name -> a row with KV tokens and accuracy."""
    return {
        name.replace("_", "-"): {
            "family": name.split("_")[0] if name not in ("low", "high") else "uniform",
            "kv_tokens": tokens,
            "accuracy": {"share": value},
            "by_type": {"code": {"share": value}},
            "recall": {"3": 0.94},
        }
        for name, (tokens, value) in shares.items()
    }


def test_uniform_is_interpolated_between_what_was_measured() -> None:
    rows = methods(low=(1000, 1.0), uniform_8=(200, 0.8), high=(100, 0.4), attention_2=(150, 0.99))

    def accuracy(row: dict[str, dict[str, float]]) -> float:
        return row["accuracy"]["share"]

    assert uniform_at(rows, 150, accuracy) == pytest.approx(0.6)
    assert uniform_at(rows, 200, accuracy) == pytest.approx(0.8)
    assert uniform_at(rows, 99, accuracy) is None
    assert uniform_at({"attention-2": rows["attention-2"]}, 150, accuracy) is None


def test_targets() -> None:
    rows = methods(low=(1000, 1.0), uniform_8=(200, 0.8), high=(100, 0.4), attention_2=(150, 0.98))
    checked = {one["target"]: one for one in check([{"chunks": 16, "methods": rows}], "attention-2")}
    assert checked["default's accuracy, of L-only's"]["value"] == pytest.approx(0.98)
    assert checked["default's accuracy, of L-only's"]["met"]
    assert checked["default's KV tokens, of L-only's"] | {"met": True} == checked["default's KV tokens, of L-only's"]
    assert checked["default over uniform at its KV tokens, code"]["value"] == pytest.approx(0.38)
    assert not checked["the scorer's recall@3"]["met"]
    assert "three chunks re-loaded contain the true span" not in checked  # attention-3 was not measured
    assert check([{"chunks": 4, "methods": rows}], "attention-2") == []
