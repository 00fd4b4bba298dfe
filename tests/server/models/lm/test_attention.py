"""Attention of new tokens over a cache is causal, the last query at the last key."""

from __future__ import annotations

import pytest
import torch

from server.models.lm.attention import attend, causal_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_cached"), [(1, 0), (1, 37), (7, 0), (7, 37), (130, 300)])
def test_every_token_sees_the_cache_and_those_up_to_itself(
    device: str, dtype: torch.dtype, num_tokens: int, num_cached: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    total = num_cached + num_tokens
    queries = torch.randn(6, num_tokens, 32, generator=generator).to(device, dtype)
    keys, values = (torch.randn(2, total + 9, 32, generator=generator).to(device, dtype)[:, :total] for _ in range(2))
    attended = attend(queries, keys, values, causal_mask(num_tokens, num_cached, queries, 32))
    assert attended.shape == queries.shape and attended.dtype == dtype
    for token in range(num_tokens):
        seen = num_cached + token + 1
        for head in range(6):
            logits = keys[head // 3, :seen].double() @ queries[head, token].double() / 32**0.5
            expected = logits.softmax(0) @ values[head // 3, :seen].double()
            torch.testing.assert_close(attended[head, token].double(), expected, atol=DTYPES[dtype], rtol=1e-2)
