"""How visual tokens become VSTs, and what a prefill sees of the chunks before."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """How visual tokens become VSTs (Video-X2L, section 2).

    ``edge_ratio`` is the ratio of the first and the last chunk at BOTH levels (2 in Video-X2L; None: no edge rule, as
    in Video-XL). ``carry`` tells whether visual tokens behind a chunk's last VST count towards the next chunk's first.
    ``prefill_mode`` tells what a chunk's L pass sees of the chunks before it: ``exact`` is their L-KVs, as published;
    ``high-memory`` their H-KVs, as an answer sees them, which keeps the L pass cheap however long the video is;
    ``recent-N`` the L-KVs of the last N and the H-KVs of the others. Raises ValueError for another name.
    """

    low_ratio: int = 2
    high_ratio: int = 32
    edge_ratio: int | None = 2
    carry: Literal["across", "reset"] = "across"
    prefill_mode: str = "exact"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"exact|high-memory|recent-[1-9]\d*", self.prefill_mode):
            raise ValueError(f"prefill_mode must be exact, high-memory or recent-N, not {self.prefill_mode!r}")

    @property
    def low_memory(self) -> int | None:
        """How many of the last chunks the L pass sees as L-KVs; None is all."""
        if self.prefill_mode == "exact":
            return None
        return int(self.prefill_mode.removeprefix("recent-")) if self.prefill_mode != "high-memory" else 0

    def ratios(self, *, first: bool, last: bool) -> tuple[int, int]:
        """The low and the high ratio of a chunk, which may be the video's first or last."""
        if self.edge_ratio is not None and (first or last):
            return self.edge_ratio, self.edge_ratio
        return self.low_ratio, self.high_ratio


def read_compression(
    config: dict[str, Any],
    *,
    low_ratio: int | None = None,
    high_ratio: int | None = None,
    prefill_mode: str | None = None,
) -> CompressionConfig:
    """The compression part of ``config.json``; what it leaves open is Video-X2L's published setting. The arguments
    override it (equal ratios: one uniform compression). Raises ValueError for a mode that does not exist."""
    default = CompressionConfig()
    return CompressionConfig(
        low_ratio=low_ratio or config.get("low_cmpr_ratio", default.low_ratio),
        high_ratio=high_ratio or config.get("high_cmpr_ratio", default.high_ratio),
        edge_ratio=config.get("edge_ratio", default.edge_ratio),
        carry=config.get("carry", default.carry),
        prefill_mode=prefill_mode or config.get("prefill_mode", default.prefill_mode),
    )
