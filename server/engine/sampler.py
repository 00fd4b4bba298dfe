"""Draws the next tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import SamplingParams
from server.models.base import Draw
from server.models.device import to_device
from server.models.lm.truncation import dropped

_COLDEST = 1e-3
"""Below, float32 cannot tell what else than the likeliest might be drawn."""
_LARGEST_SEED = (1 << 63) - 1


class Sampler:
    """One request's way to draw, with a generator of its own: what else is in the batch changes nothing."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def on_device(self) -> Draw:
        """The same for a step that draws by itself."""
        params = self.params
        if self.greedy:
            return Draw()
        seed = self._generator.initial_seed() & _LARGEST_SEED
        return Draw(max(params.temperature, _COLDEST), seed, params.top_k, params.top_p)

    @property
    def greedy(self) -> bool:
        return self.params.temperature <= 0

    def share(self) -> float:
        """The next random number, above 0 and up to 1."""
        return 1 - torch.rand((), generator=self._generator, dtype=torch.float64).item()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token id of every row of ``logits`` [rows, vocab] float32, drawn where these are: the token at which a
    share of the softmax is reached, after temperature, top-k and top-p (nucleus). Ties of greedy rows go to the lower
    id."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        rows = to_device(torch.tensor(drawn), logits.device)
        tokens[rows] = _draw(logits[rows], [samplers[row] for row in drawn])
    chosen: list[int] = tokens.tolist()
    return chosen


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    numbers = [(one.params.temperature, one.params.top_k, one.params.top_p, one.share()) for one in samplers]
    # float64: a tiny temperature must not overflow.
    columns = to_device(torch.tensor(numbers, dtype=torch.float64), logits.device)
    temperatures, top_k, top_p, shares = columns.unbind(1)
    scaled = logits.double() / temperatures[:, None]
    if any(one.params.top_k > 0 or one.params.top_p < 1 for one in samplers):
        scaled = scaled.masked_fill(dropped(scaled, top_k, top_p), -torch.inf)
    ends = scaled.softmax(-1).cumsum(-1)
    return torch.searchsorted(ends, shares[:, None] * ends[:, -1:])[:, 0]
