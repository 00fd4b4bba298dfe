"""Which chunks a question re-loads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from compression.chunk import Chunk


class SelectionError(ValueError):
    """A dial that this video cannot meet. ``param`` names the offending field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Dial:
    """How much to re-load. At most one of the first four is set; with none, the model's default ``reload`` applies.

    ``budget_tokens`` bounds the whole mixed cache with its prefix. ``start_s`` and ``end_s`` limit the candidates.
    With several videos the chunks are numbered through, and each has its own clock.
    """

    reload: int | None = None
    budget_tokens: int | None = None
    chunks: tuple[int, ...] | None = None
    mode: Literal["auto", "low", "high"] | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The chunks to re-load, best score first."""

    chunks: tuple[int, ...]

    def __contains__(self, index: int) -> bool:
        return index in self.chunks


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """KV tokens of the prefix and of every chunk at both levels."""

    prefix: int
    low: Sequence[int]
    high: Sequence[int]

    def mixed(self, selected: Selection) -> int:
        """KV tokens of the mixed cache, prefix included."""
        extra = sum(self.low[index] - self.high[index] for index in selected.chunks)
        return self.prefix + sum(self.high) + extra


def select(
    scores: Sequence[float], dial: Dial, chunks: Sequence[Chunk], sizes: CacheSizes, *, default_reload: int
) -> Selection:
    """Applies ``dial`` to one score per chunk, of one video or of several, one behind the other. Ties go to the earlier
    chunk.

    Raises SelectionError: a chunk out of range or of the time range, a budget below the all-H cache, an empty or
    reversed time range.
    """
    candidates = _in_range(dial, chunks)
    if dial.chunks is not None:
        _check_named(dial.chunks, candidates, chunks)
        candidates = set(dial.chunks)
    ranked = sorted(candidates, key=lambda index: (-scores[index], index))
    if dial.chunks is not None or dial.mode == "low":
        return Selection(tuple(ranked))
    if dial.mode == "high":
        return Selection(())
    if dial.budget_tokens is not None:
        return _within_budget(ranked, dial.budget_tokens, sizes)
    reload = default_reload if dial.reload is None else dial.reload
    return Selection(tuple(ranked[:reload]))


def peaks(scores: Sequence[float], share: float, most: int) -> tuple[int, ...]:
    """At most ``most`` chunks that score at least ``share`` of the best one, best first.

    As many as the scores have peaks: one for a question about one moment, more for a question about several.
    """
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return tuple(index for index in ranked[:most] if scores[index] >= share * scores[ranked[0]])


def fewest(scores: Sequence[float], share: float, most: int) -> tuple[int, ...]:
    """The fewest chunks that together have ``share`` of all scores, but at most ``most``, best first."""
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    reached = accumulate(scores[index] for index in ranked)
    count = 1 + sum(1 for together in reached if together < share * sum(scores))
    return tuple(ranked[: min(count, most)])


def _check_named(named: Sequence[int], inside: Collection[int], chunks: Sequence[Chunk]) -> None:
    for index in named:
        if not 0 <= index < len(chunks):
            raise SelectionError(
                f"chunk {index} is out of range: the video has chunks 0 to {len(chunks) - 1}", "chunks"
            )
        if index not in inside:
            chunk = chunks[index]
            raise SelectionError(
                f"chunk {index} ({chunk.start_s:g} to {chunk.end_s:g} s) lies outside start_s..end_s", "chunks"
            )


def _in_range(dial: Dial, chunks: Sequence[Chunk]) -> set[int]:
    start_s = 0.0 if dial.start_s is None else dial.start_s
    end_s = float("inf") if dial.end_s is None else dial.end_s
    if start_s >= end_s:
        raise SelectionError("start_s must lie before end_s", "end_s" if dial.start_s is None else "start_s")
    inside = {index for index, chunk in enumerate(chunks) if chunk.overlaps(start_s, end_s)}
    if not inside:
        last_s = max(chunk.end_s for chunk in chunks)
        raise SelectionError(f"start_s is {start_s:g}, but the video ends at {last_s:g} s", "start_s")
    return inside


def _within_budget(ranked: Sequence[int], budget_tokens: int, sizes: CacheSizes) -> Selection:
    smallest = sizes.mixed(Selection(()))
    if budget_tokens < smallest:
        raise SelectionError(
            f"budget_tokens is {budget_tokens}, but the smallest cache of this video has {smallest}", "budget_tokens"
        )
    chosen: list[int] = []
    for index in ranked:
        if sizes.mixed(Selection((*chosen, index))) <= budget_tokens:
            chosen.append(index)
    return Selection(tuple(chosen))
