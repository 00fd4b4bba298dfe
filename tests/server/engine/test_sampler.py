from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import SamplingParams
from server.engine.sampler import Sampler, sample

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def draws(count: int = 4000, **params: object) -> torch.Tensor:
    """Relative frequency of every token."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 3, **params}))
    tokens = [sample(LOGITS[None], [sampler])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    assert torch.allclose(draws(temperature=temperature), (LOGITS / temperature).softmax(-1), atol=0.03)


def test_top_k_keeps_the_best_and_renormalises() -> None:
    expected = torch.tensor([0.0, 1.0, 0.0, 0.0]) * LOGITS.exp() + torch.tensor([0.0, 0.0, 1.0, 0.0]) * LOGITS.exp()
    assert torch.allclose(draws(top_k=2), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {1}), (0.6, {1}), (0.65, {1, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(top_p=top_p).nonzero().flatten().tolist()) == kept


def test_a_seed_repeats_itself_whatever_else_is_in_the_batch() -> None:
    params = SamplingParams(1.0, seed=11)
    alone, other, batched = Sampler(params), Sampler(SamplingParams(1.0, seed=5)), Sampler(params)
    greedy = Sampler(SamplingParams(0.0))
    first = [sample(LOGITS[None], [alone])[0] for _ in range(50)]
    second = [sample(LOGITS.expand(3, -1), [other, batched, greedy]) for _ in range(50)]
    assert [row[1] for row in second] == first
    assert {row[2] for row in second} == {1}
    assert [row[0] for row in second] != first


def test_without_a_seed_two_requests_differ() -> None:
    samplers = [Sampler(SamplingParams(5.0)) for _ in range(2)]
    rows = [sample(LOGITS.expand(2, -1), samplers) for _ in range(60)]
    assert [row[0] for row in rows] != [row[1] for row in rows]


@given(st.floats(1e-6, 5), st.integers(0, 10), st.floats(0, 1), st.integers(0, 2**63))
def test_any_parameters_draw_a_token(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    sampler = Sampler(SamplingParams(temperature, top_p, top_k, seed))
    assert 0 <= sample(LOGITS[None] * 30, [sampler])[0] < 4
