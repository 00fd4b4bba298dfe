"""Text that others wrote, as a terminal may be given it."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len, set_cell_size

_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with what would steer a terminal, break the line or turn its direction as visible escapes (``\\x1b``),
    but for the characters of ``keep``."""
    return "".join(
        char.encode("unicode_escape").decode() if char not in keep and _steers(char) else char for char in text
    )


def elided(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns: what is longer ends in ``…``."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1).rstrip()}…"


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _TURNING
