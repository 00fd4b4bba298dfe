from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.models.lm.truncation import dropped

Row = tuple[list[float], int, float]
rows = st.tuples(st.lists(st.integers(-4, 4).map(float), min_size=9, max_size=9), st.integers(0, 12), st.floats(0, 1))


def likely(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Word for word."""
    ids = sorted(range(len(logits)), key=lambda place: (-logits[place], place))
    ids = ids[:top_k] if top_k else ids
    weights = torch.tensor([logits[place] for place in ids], dtype=torch.float64).softmax(-1)
    kept, before = set(), 0.0
    for place, weight in zip(ids, weights.tolist(), strict=True):
        if not kept or top_p == 1 or before < top_p - 1e-9:
            kept.add(place)
        before += weight
    return kept


@given(st.lists(rows, min_size=1, max_size=4))
def test_every_row_leaves_out_its_own(batch: list[Row]) -> None:
    logits = torch.tensor([row[0] for row in batch], dtype=torch.float64)
    top_k, top_p = torch.tensor([row[1] for row in batch]), torch.tensor([row[2] for row in batch], dtype=torch.float64)
    out = dropped(logits, top_k, (top_p - 1e-9).where(top_p < 1, top_p))
    for left_out, row in zip(out, batch, strict=True):
        assert set((~left_out).nonzero()[:, 0].tolist()) == likely(*row)
