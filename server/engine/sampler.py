"""Draws the next tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import SamplingParams

_COLDEST = 1e-3
"""Below, logits in float32 may overflow."""
_LARGEST_SEED = (1 << 63) - 1


class Sampler:
    """One request's way to draw, with a generator of its own: what else is in the batch changes nothing."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def on_device(self) -> tuple[float, int] | None:
        """Temperature and seed, if that is all that a draw depends on."""
        params = self._params
        if self.greedy:
            return 0.0, 0
        plain = params.top_k == 0 and params.top_p >= 1 and params.temperature > _COLDEST
        return (params.temperature, self._generator.initial_seed() & _LARGEST_SEED) if plain else None

    @property
    def greedy(self) -> bool:
        return self._params.temperature <= 0

    def draw(self, logits: Tensor) -> int:
        """One token id from ``logits`` [vocab] float32 on the CPU: temperature, then top-k, then top-p (nucleus)."""
        params = self._params
        # float64: a tiny temperature must not overflow.
        ordered, ids = (logits.double() / params.temperature).sort(descending=True, stable=True)
        if params.top_k > 0:
            ordered, ids = ordered[: params.top_k], ids[: params.top_k]
        weights = ordered.softmax(-1)
        if params.top_p < 1:
            # A token stays while those before it do not reach top_p; the first always stays.
            before = weights.cumsum(-1) - weights
            weights = weights.where((before < params.top_p).index_fill_(0, torch.tensor([0]), True), 0)
        return int(ids[torch.multinomial(weights, 1, generator=self._generator)])


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token id of every row of ``logits`` [rows, vocab] float32. Ties of greedy rows go to the lower id."""
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        for row, row_logits in zip(drawn, logits[drawn].cpu(), strict=True):
            chosen[row] = samplers[row].draw(row_logits)
    return chosen
