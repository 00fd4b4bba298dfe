"""How visual tokens become VSTs, and what a prefill sees of the chunks before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from server.models.base import check_ratios
from server.models.memory import Past


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """How visual tokens become VSTs (Video-X2L, section 2).

    ``edge_ratio`` is the ratio of the first and the last chunk at BOTH levels (2 in Video-X2L; None: no edge rule, as
    in Video-XL). ``carry`` tells whether visual tokens behind a chunk's last VST count towards the next chunk's first.
    ``prefill_mode`` tells what a chunk's passes see of the chunks before it (server.models.memory); ``exact`` is as
    published. Raises ValueError for a name that does not exist, and for a low ratio above the high one.
    """

    low_ratio: int = 2
    high_ratio: int = 32
    edge_ratio: int | None = 2
    carry: Literal["across", "reset"] = "across"
    prefill_mode: str = "exact"

    def __post_init__(self) -> None:
        Past.of(self.prefill_mode)
        check_ratios(self.low_ratio, self.high_ratio)

    @property
    def past(self) -> Past:
        """What a chunk's passes see of the chunks before it."""
        return Past.of(self.prefill_mode)

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
    override it (equal ratios: one uniform compression). Raises ValueError as CompressionConfig does."""
    default = CompressionConfig()
    return CompressionConfig(
        low_ratio=low_ratio or config.get("low_cmpr_ratio", default.low_ratio),
        high_ratio=high_ratio or config.get("high_cmpr_ratio", default.high_ratio),
        edge_ratio=config.get("edge_ratio", default.edge_ratio),
        carry=config.get("carry", default.carry),
        prefill_mode=prefill_mode or config.get("prefill_mode", default.prefill_mode),
    )
