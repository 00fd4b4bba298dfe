"""Draws the next tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import SamplingParams
from server.models.base import Draw
from server.models.lm.truncation import dropped

_COLDEST = 1e-3
"""Below, float32 cannot tell what else than the likeliest might be drawn."""
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
    def on_device(self) -> Draw:
        """The same for a step that draws by itself."""
        params = self._params
        if self.greedy:
            return Draw()
        seed = self._generator.initial_seed() & _LARGEST_SEED
        return Draw(max(params.temperature, _COLDEST), seed, params.top_k, params.top_p)

    @property
    def greedy(self) -> bool:
        return self._params.temperature <= 0

    def draw(self, logits: Tensor) -> int:
        """One token id from ``logits`` [vocab] float32 on the CPU: temperature, then top-k, then top-p (nucleus)."""
        params = self._params
        # float64: a tiny temperature must not overflow.
        scaled = logits.double() / params.temperature
        if params.top_k > 0 or params.top_p < 1:
            top_k, top_p = torch.tensor([params.top_k]), torch.tensor([params.top_p], dtype=torch.float64)
            scaled = scaled.masked_fill(dropped(scaled[None], top_k, top_p)[0], -torch.inf)
        return int(torch.multinomial(scaled.softmax(-1), 1, generator=self._generator))


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token id of every row of ``logits`` [rows, vocab] float32. Ties of greedy rows go to the lower id."""
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        for row, row_logits in zip(drawn, logits[drawn].cpu(), strict=True):
            chosen[row] = samplers[row].draw(row_logits)
    return chosen
