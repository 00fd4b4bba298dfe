"""The picture of a run: accuracy against KV tokens, and what the same KV tokens are worth to each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.interval import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES: dict[str, tuple[str, str, str]] = {
    "uniform": ("one uniform ratio", "#555555", "s"),
    "attention": ("bi-level, attention of chosen heads", "#0b62a4", "o"),
    "every-head": ("bi-level, attention of every head", "#4fa3d9", "^"),
    "cosine": ("bi-level, cosine", "#e08214", "D"),
    "raw": ("no compression", "#111111", "*"),
}
"""Family -> label, colour, marker. What is at the default's budget stands in the second row, others are points."""
_OTHERS = (
    "#7b3294", "#1b9e77", "#d01c8b", "#a6611a", "#666600", "#b30000", "#2c7fb8", "#f4a582", "#636363", "#41ab5d",
    "#8c6bb1", "#c9a000",
)  # fmt: skip
_FROM_HIGH = ("attention", "every-head", "cosine")
"""These begin where nothing is re-loaded."""
_TITLE = "Accuracy on fresh synthetic videos, with 95 % intervals"


class PlotUnavailable(RuntimeError):  # noqa: N818 - errors are named for what is wrong
    """matplotlib is not installed."""


def require_matplotlib() -> None:
    """Raises PlotUnavailable, to be told before a long run and not behind it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotUnavailable(
            "the plot needs matplotlib: pip install 'video-x2l-server[bench]', or give --no-plot"
        ) from None


def draw(summary: Sequence[Mapping[str, Any]], default: str, path: Path) -> None:
    """Writes a PNG with one column a length; with one length, its two pictures stand beside each other.

    ``default`` names the method that a server uses by itself. Raises PlotUnavailable, OSError.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = len(summary)
    if columns == 1:
        figure = Figure(figsize=(11.0, 4.8), dpi=120, layout="constrained")
        grid = figure.subplots(1, 2, squeeze=False).T
    else:
        figure = Figure(figsize=(4.4 * columns, 9.6), dpi=120, layout="constrained")
        grid = figure.subplots(2, columns, squeeze=False, height_ratios=(1.0, 1.15))
    for column, part in enumerate(summary):
        _draw_lines(grid[0, column], part["methods"], f"{part['chunks']} chunks ({part['videos']} videos)")
        _draw_at_default(grid[1, column], part["methods"], default)
    grid[0, 0].set_ylabel("right answers")
    handles = {text: handle for axes in grid[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    ncols = min(len(handles) or 1, int(figure.get_figwidth() / 3.5))
    most_rows = max(len(_at_default(part["methods"], default)) for part in summary)
    figure.set_figheight(
        figure.get_figheight() + 0.13 * max(0, most_rows - 20) + 0.2 * max(0, len(handles) / ncols - 4)
    )
    figure.legend(
        [*handles.values()],
        [*handles],
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
        fontsize=10,
    )
    figure.suptitle(_TITLE, fontsize=13)
    figure.savefig(path, metadata={"Software": None})


def _draw_lines(axes: Axes, methods: Mapping[str, Any], title: str) -> None:
    alone = {row["family"] for row in methods.values() if not row["at_default"]} - LINES.keys()
    for family, (label, color, marker) in (LINES | _others(alone)).items():
        rows = [row for row in methods.values() if row["family"] == family]
        bottom = "high" if family in _FROM_HIGH else family.replace("-bilevel", "-high")
        if rows and bottom != family and bottom in methods:
            rows.insert(0, methods[bottom])
        points = sorted(_point(row) for row in rows if row["kv_tokens"])
        if points:
            tokens, shares, below, above = zip(*points, strict=True)
            axes.errorbar(
                tokens, shares, yerr=(below, above), label=label, color=color, marker=marker,
                markersize=5, linewidth=1.5, elinewidth=0.8, capsize=2,
                linestyle="--" if family.endswith("-uniform") else "-",
            )  # fmt: skip
    axes.set(title=title, xlabel="KV tokens in the cache", ylim=(-0.02, 1.03), xscale="log")
    _tokens_axis(axes)
    axes.grid(alpha=0.25)


def _others(families: Set[str]) -> dict[str, tuple[str, str, str]]:
    """The same as LINES; a compressor's lines have one colour."""
    ends = ("-uniform", "-bilevel", "-over-1")
    stems = {family: reduce(str.removesuffix, ends, family) for family in sorted(families)}
    numbers = {stem: number for number, stem in enumerate(dict.fromkeys(stems.values()))}
    colors = {stem: _OTHERS[number % len(_OTHERS)] for stem, number in numbers.items()}
    markers = {
        family: "v" if family == stem else "s" if family.endswith("-over-1") else "o" for family, stem in stems.items()
    }
    return {family: (family, colors[stem], markers[family]) for family, stem in stems.items()}


def _tokens_axis(axes: Axes) -> None:
    """Plain numbers: 1 000 rather than a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_at_default(axes: Axes, methods: Mapping[str, Any], default: str) -> None:
    """The methods that spend what the default spends, worst at the bottom."""
    rows = _at_default(methods, default)
    order = sorted(rows, key=lambda name: rows[name]["accuracy"]["share"])
    for place, name in enumerate(order):
        _, share, below, above = _point(rows[name])
        color = "#0b62a4" if name == default else "#555555"
        axes.errorbar(share, place, xerr=([below], [above]), color=color, marker="o", markersize=5, capsize=2)
    axes.set(xlim=(-0.02, 1.03), ylim=(-0.7, max(len(order), 1) - 0.3), xlabel="right answers")
    axes.set_yticks(range(len(order)), [f"{name} (default)" if name == default else name for name in order], fontsize=8)
    if default in rows:
        axes.set_title(f"at the default's {rows[default]['kv_tokens']:.0f} KV tokens", fontsize=10)
    axes.grid(alpha=0.25)


def _at_default(methods: Mapping[str, Any], default: str) -> dict[str, Any]:
    return {name: row for name, row in methods.items() if row["at_default"] or name == default}


def _point(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """KV tokens, share, and how far its interval reaches below and above."""
    right, asked = row["accuracy"]["right"], row["accuracy"]["asked"]
    low, high = wilson(right, asked)
    share = right / max(1, asked)
    return row["kv_tokens"] or 0.0, share, max(0.0, share - low), max(0.0, high - share)
