"""The training-free methods by name."""

from __future__ import annotations

from collections.abc import Mapping

from compression.compressor import Compressor
from compression.eviction import Eviction, Spread
from compression.frame_subsampling import FrameSubsampling
from compression.infinipot import InfiniPot
from compression.keydiff import KeyDiff
from compression.pool import Pool
from compression.raw_retrieval import RawRetrieval
from compression.recency import RecencyWindow
from compression.snap import Snap
from compression.stride import Stride
from compression.value_norm import ValueNorm

COMPRESSORS: Mapping[str, Compressor] = {
    "stride": Stride(),
    "pool": Pool(),
    "snap": Snap(),
    "value-norm": ValueNorm(),
    "keydiff": KeyDiff(),
    "infinipot": InfiniPot(),
}
"""Those that compress a chunk by itself, and so can make both levels during prefill."""

EVICTIONS: Mapping[str, Eviction] = {
    **{name: Spread(compressor) for name, compressor in COMPRESSORS.items()},
    "frames": FrameSubsampling(),
    "recency": RecencyWindow(),
    "raw-retrieval": RawRetrieval(),
}
"""All of them, over a whole video."""
