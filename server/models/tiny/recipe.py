"""What the bundled model was trained with: the curriculum and the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from server.models.tiny.packed import Shape
from server.models.tiny.questions import FINAL_MIX

RATIOS = (2, 4, 8, 16, 32, 64)
CODES_MIX: Mapping[str, float] = {
    "code": 0.50, "exist": 0.05, "order": 0.08, "count": 0.05, "time": 0.07, "object": 0.07, "multi": 0.06,
    "rev": 0.02, "atcode": 0.05, "describe": 0.01, "refuse": 0.03, "greeting": 0.01,
}  # fmt: skip
"""Half of the questions about codes: they are what is learnt last."""

HARD_MIX: Mapping[str, float] = {
    "code": 0.20, "exist": 0.10, "order": 0.13, "count": 0.14, "time": 0.10, "object": 0.13, "multi": 0.13,
    "rev": 0.02, "atcode": 0.02, "describe": 0.01, "refuse": 0.02,
}  # fmt: skip
"""More of what was still wrong after stage 2."""


@dataclass(frozen=True, slots=True)
class Level:
    """One step of the curriculum: what videos look like."""

    chunks: Mapping[int, float]
    """Video length in chunks -> share."""
    durations: Mapping[int, float]
    """Shot length in seconds -> share."""
    p_static: float
    """Share of shots whose codes stay as they are."""
    p_gentle: float
    """Share of steps with ratio 2 or 4 everywhere."""
    gate: float
    """Mean accuracy on codes at ratios up to 4 that ends the level."""
    longest: int
    """Steps after which the level ends anyway."""


LEVELS = (
    Level({1: 0.4, 2: 0.4, 4: 0.2}, {8: 0.6, 6: 0.2, 4: 0.2}, 0.9, 0.5, 0.8, 1500),
    Level({2: 0.3, 4: 0.4, 8: 0.3}, {8: 0.5, 6: 0.2, 4: 0.3}, 0.5, 0.25, 0.7, 1500),
    Level({4: 0.15, 8: 0.25, 16: 0.6}, {8: 0.5, 6: 0.2, 4: 0.25, 2: 0.05}, 0.2, 0.1, 2.0, 10**9),
    Level({4: 0.1, 8: 0.1, 16: 0.3, 32: 0.2, 64: 0.3}, {8: 0.5, 6: 0.2, 4: 0.25, 2: 0.05}, 0.2, 0.1, 2.0, 10**9),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a run depends on besides the code."""

    steps: int = 12_000
    batch: int = 16
    num_chunks: int = 16
    """Chunk slots of one packed sequence; it has two question rows a slot."""
    seed: int = 1_000_001
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    warmup: int = 100
    hold: float = 0.5
    """Share of the steps at the full learning rate; a cosine follows."""
    reading_weight: float = 0.3
    """Auxiliary: objects, plates and codes of a frame, read off its visual tokens and off its last VST."""
    retrieval_weight: float = 0.2
    """Auxiliary: attention of the prompt's last token to the right chunk and the right frame."""
    auxiliary_layer: int = 3
    fade: float = 0.5
    """Share of the steps after which the auxiliary reading is down to a tenth."""
    p_uniform: float = 0.35
    p_raw: float = 0.15
    """Share of steps with some uncompressed chunks."""
    p_late: float = 0.3
    """Share of videos that do not begin at 00:00, so that every digit of the clock is seen."""
    p_dialogue: float = 0.25
    """Share of questions that follow others."""
    p_bilevel: float = 0.0
    """Share of steps with nearly all chunks at ratio 32 and the others at 2, as questions are answered."""
    p_raw_video: float = 0.0
    """Share of steps with no chunk compressed; needs room in the packed sequence (``min_ratio`` 1)."""
    min_ratio: int = 2
    p_gap: float = 0.2
    """Share of steps with gaps between the chunks' positions, as in longer videos."""
    init: str = ""
    level: int = 0
    phrasings: int = 3000
    mix: Mapping[str, float] = field(default_factory=lambda: dict(FINAL_MIX))


STAGES: Mapping[str, Recipe] = {
    "1-codes": Recipe(steps=3_100, batch=10, hold=1.0, fade=1.0, mix=CODES_MIX),
    "2-long": Recipe(steps=4_600, seed=1_000_002, level=3, num_chunks=64, batch=3, hold=0.8, fade=0.4, p_bilevel=0.2),
    "3-all": Recipe(
        steps=5_484, seed=1_000_003, level=3, num_chunks=64, batch=3, muon_lr=2e-3, adam_lr=1e-3, hold=0.1, fade=0.01,
        p_bilevel=0.2, p_raw_video=0.08, min_ratio=1, mix=HARD_MIX,
    ),
}  # fmt: skip
"""What ``python -m server.models.tiny.train`` runs, each stage from the weights of the one before."""


def draw_ratios(rng: np.random.Generator, recipe: Recipe, level: Level, shape: Shape) -> list[int]:
    """A ratio a chunk slot, within the packed sequence's memory."""
    num = shape.num_chunks
    if rng.random() < level.p_gentle:
        return [int(rng.choice([2, 4]))] * num
    if rng.random() < recipe.p_raw_video:
        return [1] * num
    if rng.random() < recipe.p_bilevel:
        return [int(ratio) for ratio in np.where(rng.random(num) < 0.08, 2, 32)]
    while True:
        if rng.random() < recipe.p_uniform:
            ratios = np.full(num, rng.choice(RATIOS, p=[0.26, 0.14, 0.14, 0.14, 0.26, 0.06]))
        else:
            ratios = rng.choice(RATIOS, num, p=[0.30, 0.14, 0.12, 0.14, 0.24, 0.06])
            if rng.random() < recipe.p_raw:
                ratios = np.where(rng.random(num) < 0.3, 1, ratios)
        if sum(shape.chunk_tokens // ratio for ratio in ratios) <= shape.memory:
            return [int(ratio) for ratio in ratios]


def draw_gaps(rng: np.random.Generator, recipe: Recipe, shape: Shape) -> list[int] | None:
    """Positions to leave free before every chunk; None in most steps."""
    if rng.random() >= recipe.p_gap:
        return None
    gaps = rng.integers(0, 1200, shape.num_chunks) * (rng.random(shape.num_chunks) < 0.4)
    return [int(gap) for gap in gaps]
