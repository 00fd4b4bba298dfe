"""The score of a run, by category, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from server.bench.datasets.item import Benchmark, Item
from server.bench.interval import share

_SHOWN = 5


def summarize(benchmark: Benchmark, items: Sequence[Item], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the records say about ``items``.

    A group counts when every one of its items has a reply. ``accuracy`` is over all groups, ``mean`` is the mean of
    the categories of the benchmark's own dimension; ``score`` names the one that its authors report.
    """
    verdicts = [(group[0], _verdict(benchmark, group, records)) for group in _groups(items)]
    scored = [(item, verdict == "right") for item, verdict in verdicts if verdict in ("right", "wrong")]
    names = {name for item, _ in scored for name in item.categories}
    dimensions = sorted(names, key=lambda name: (name != benchmark.dimension, name))
    categories = {name: _by_category(scored, name) for name in dimensions}
    shares = [cell["share"] for cell in categories.get(benchmark.dimension, {}).values()]
    replies = [records[item.id] for item in items if item.id in records]
    return {
        "dataset": benchmark.name,
        "score": f"mean of {benchmark.dimension}" if benchmark.scores_mean else "accuracy",
        "accuracy": _cell(right for _, right in scored),
        "mean": round(sum(shares) / len(shares), 4) if shares else None,
        "categories": categories,
        "items": {
            "all": len(items),
            "answered": sum(record["error"] is None for record in replies),
            "missing_video": sum(record["error"] is not None and record["missing"] for record in replies),
            "failed": sum(record["error"] is not None and not record["missing"] for record in replies),
            "not_asked": len(items) - len(replies),
        },
        "groups": {
            "all": len(verdicts),
            "scored": len(scored),
            "unanswered": sum(verdict == "unanswered" for _, verdict in verdicts),
        },
        "errors": {record["video"]: record["error"] for record in replies if record["error"] is not None},
        "kv_tokens": _means(replies, "kv_tokens"),
        "timings_ms": _means(replies, "timings_ms"),
    }


def table(summary: Mapping[str, Any]) -> Table:
    """Category by category: right answers, questions, per cent with the 95 % interval."""
    made = Table("category", "right", "of", "%", "95 % interval", box=None, header_style="bold")
    for dimension, cells in summary["categories"].items():
        made.add_row(f"by {dimension}", style="dim")
        for name, cell in cells.items():
            made.add_row(f"  {name}", *_row(cell))
    made.add_row("all", *_row(summary["accuracy"]), style="bold")
    return made


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """What stands below the table: the benchmark's score, and what is missing from it."""
    items, groups = summary["items"], summary["groups"]
    value = summary["mean"] if summary["score"].startswith("mean") else summary["accuracy"]["share"]
    lines = [f"score of {summary['dataset']} ({summary['score']}): {_per_cent(value)}"]
    troubles = {
        "without their video": items["missing_video"],
        "failed": items["failed"],
        "not asked": items["not_asked"],
    }
    missing = [f"{count} {name}" for name, count in troubles.items() if count]
    if missing:
        lines.append(f"{items['answered']} of {items['all']} questions have a reply: {', '.join(missing)}")
        shown = list(summary["errors"].items())
        lines += [f"  {video}: {error}" for video, error in shown[:_SHOWN]]
        lines += [f"  and {len(shown) - _SHOWN} more videos"] * (len(shown) > _SHOWN)
    if groups["unanswered"]:
        lines.append(f"{groups['unanswered']} replies name no option; the benchmark leaves them out")
    return lines


def _groups(items: Iterable[Item]) -> list[list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return list(groups.values())


def _verdict(benchmark: Benchmark, group: Sequence[Item], records: Mapping[str, Mapping[str, Any]]) -> str:
    """ "right", "wrong", "unanswered" where that is left out, or "" without all replies."""
    found = [records.get(item.id) for item in group]
    if any(record is None or record["error"] is not None for record in found):
        return ""
    choices = [benchmark.choose(item, record["reply"]) for item, record in zip(group, found, strict=True) if record]
    if not benchmark.counts_unanswered and "" in choices:
        return "unanswered"
    return "right" if all(choice == item.answer for choice, item in zip(choices, group, strict=True)) else "wrong"


def _by_category(scored: Sequence[tuple[Item, bool]], dimension: str) -> dict[str, dict[str, Any]]:
    names = sorted({item.categories[dimension] for item, _ in scored})
    return {name: _cell(right for item, right in scored if item.categories[dimension] == name) for name in names}


def _cell(verdicts: Iterable[bool]) -> dict[str, Any]:
    counted = list(verdicts)
    return share(sum(counted), len(counted))


def _means(records: Iterable[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    """The mean of each figure that the server tells under ``name``; None from a server that tells none."""
    found = [record[name] for record in records if record.get(name)]
    return {key: round(sum(cell[key] for cell in found) / len(found), 1) for key in found[0]} if found else None


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{_per_cent(cell['low'])} to {_per_cent(cell['high'])}"
    return str(cell["right"]), str(cell["asked"]), _per_cent(cell["share"]), interval


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
