"""The table of a run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.bench.reply import PHASES
from server.bench.summary import TYPES

WIDTH = 190
"""Columns that the table takes where the output is no terminal."""


_COLUMNS = ("KV\ntokens", "KV\nMB", "all\ntypes", "", "recall\n@1", "recall\n@3", "span\nprecision", "span\nrecall")


def print_table(summary: Sequence[Mapping[str, Any]], default: str, console: Console) -> None:
    """All lengths in one table, a section each; shares in per cent."""
    table = Table(title="right answers in per cent [95 % interval]", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in (*_COLUMNS[:4], *TYPES, *_COLUMNS[4:], *(f"{phase}\nms" for phase in PHASES), "errors"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in summary:
        table.add_section()
        table.add_row(f"[bold]{part['chunks']} chunks, {part['videos']} videos[/]")
        for name, row in part["methods"].items():
            shown = f"[bold]{name} (default)[/]" if name == default else name
            table.add_row(shown, *_cells(row))
    console.print(table)
    console.print(
        "recall@k: the scorer's, of as many chunks with the answer as fit into k; span: of the re-loaded chunks; "
        "times: medians of questions asked alone"
    )


def print_targets(targets: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line a target."""
    for one in targets:
        bound = f"at most {one['at_most']}" if "at_most" in one else f"at least {one['at_least']}"
        met = "[green]met   [/]" if one["met"] else "[red]MISSED[/]"
        console.print(
            f"{met} {one['chunks']:>3} chunks  {one['target']}: {one['value']:.3f} ({bound})", highlight=False
        )


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    return [
        _number(row["kv_tokens"], "{:.0f}"),
        _number(row["kv_nbytes"], "{:.2f}", 1e-6),
        f"[bold]{_number(accuracy['share'], '{:.1f}', 100)}[/]",
        f"{100 * accuracy['low']:.1f}-{100 * accuracy['high']:.1f}",
        *(_number(row["by_type"].get(kind, {}).get("share"), "{:.0f}", 100) for kind in TYPES),
        *(_number(row["recall"][count], "{:.0f}", 100) for count in ("1", "3")),
        _number(row["span_precision"], "{:.0f}", 100),
        _number(row["span_recall"], "{:.0f}", 100),
        *(_number(row["median_ms"][phase], "{:.0f}") for phase in PHASES),
        str(row["errors"] or ""),
    ]


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)
