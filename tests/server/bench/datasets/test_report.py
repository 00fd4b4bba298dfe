"""Scores from replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.bench.datasets.item import Item
from server.bench.datasets.registry import BENCHMARKS
from server.bench.datasets.report import summarize, table, verdict_lines
from server.bench.interval import wilson


def item(name: str, group: str, category: str, dimension: str) -> Item:
    return Item(name, Path("v.mp4"), "", ("a", "b", "c", "d"), "A", group, {dimension: category})


def replied(**replies: str | None) -> dict[str, dict[str, Any]]:
    """Records by id; None is an error."""
    return {
        name: {
            "id": name,
            "video": "v.mp4",
            "error": None if reply is not None else "HTTP 500",
            "missing": False,
            "reply": reply,
        }
        for name, reply in replies.items()
    }


def test_vnbench_needs_all_four_tries() -> None:
    tries = [item(f"{group}{n}", group, group[:3], "type") for group in ("ret1", "ret2", "cnt1") for n in range(4)]
    replies = {made.id: "A" for made in tries} | {"ret23": "B"}
    summary = summarize(BENCHMARKS["vnbench"], tries, replied(**replies))
    assert summary["accuracy"] | {"low": 0, "high": 0} == {
        "right": 2, "asked": 3, "share": 0.6667, "low": 0, "high": 0
    }  # fmt: skip
    assert {name: cell["share"] for name, cell in summary["categories"]["type"].items()} == {"ret": 0.5, "cnt": 1.0}
    assert summary["mean"] == 0.75
    assert summary["score"] == "mean of type"
    assert verdict_lines(summary) == ["score of vnbench (mean of type): 75.0"]


def test_a_group_without_all_its_replies_does_not_count() -> None:
    tries = [item(f"{group}{n}", group, "ret", "type") for group in ("v1", "v2") for n in range(4)]
    replies: dict[str, str | None] = {made.id: "A" for made in tries}
    replies["v13"] = None
    del replies["v22"]
    summary = summarize(BENCHMARKS["vnbench"], tries, replied(**replies))
    assert summary["accuracy"]["asked"] == 0
    assert summary["accuracy"]["share"] is summary["mean"] is None
    assert summary["items"] == {"all": 8, "answered": 6, "missing_video": 0, "failed": 1, "not_asked": 1}
    assert verdict_lines(summary)[1:] == ["6 of 8 questions have a reply: 1 failed, 1 not asked", "  v.mp4: HTTP 500"]


def test_videomme_leaves_out_what_names_no_option() -> None:
    items = [item(str(n), str(n), "short", "duration") for n in range(4)]
    summary = summarize(BENCHMARKS["videomme"], items, replied(**{"0": "A", "1": "B", "2": "", "3": "A."}))
    assert (summary["accuracy"]["right"], summary["accuracy"]["asked"]) == (2, 3)
    assert summary["groups"] == {"all": 4, "scored": 3, "unanswered": 1}
    assert verdict_lines(summary)[0] == "score of videomme (accuracy): 66.7"


def test_mlvu_counts_it_as_wrong() -> None:
    items = [item(str(n), str(n), "ego", "task") for n in range(2)]
    summary = summarize(BENCHMARKS["mlvu"], items, replied(**{"0": "A", "1": ""}))
    assert (summary["accuracy"]["right"], summary["accuracy"]["asked"]) == (1, 2)


def test_intervals_and_table() -> None:
    items = [item(str(n), str(n), "ego" if n % 2 else "count", "task") for n in range(10)]
    summary = summarize(BENCHMARKS["mlvu"], items, replied(**{str(n): "A" if n < 7 else "B" for n in range(10)}))
    cell = summary["accuracy"]
    assert (cell["right"], cell["asked"], cell["share"]) == (7, 10, 0.7)
    assert (cell["low"], cell["high"]) == pytest.approx(wilson(7, 10), abs=1e-4)
    assert table(summary).row_count == 4  # the dimension, its two categories, all


def test_kv_tokens_are_averaged_where_the_server_tells() -> None:
    items = [item(str(n), str(n), "ego", "task") for n in range(3)]
    records = replied(**{"0": "A", "1": "A", "2": "A"})
    assert summarize(BENCHMARKS["mlvu"], items, records)["kv_tokens"] is None
    records["0"]["kv_tokens"] = {"mixed": 10, "low": 40, "high": 4}
    records["1"]["kv_tokens"] = {"mixed": 20, "low": 80, "high": 8}
    assert summarize(BENCHMARKS["mlvu"], items, records)["kv_tokens"] == {"mixed": 15, "low": 60, "high": 6}
