"""Every bit of the weights counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from server.models.fingerprint import digest, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 3, 1 << 16, (1 << 19) + 5])
def test_one_bit_anywhere_changes_the_digest(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 100, (size,), generator=generator).to(dtype)
    first = digest(tensor)
    assert digest(tensor.clone()) == first
    for place in {0, size // 2, size - 1} if size else ():
        changed = tensor.clone()
        changed[place : place + 1].view(torch.uint8)[0] ^= 1
        assert digest(changed) != first
        changed.copy_(tensor)[place : place + 1].view(torch.uint8)[-1] ^= 128
        assert digest(changed) != first


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(8)), st.lists(st.booleans(), min_size=8, max_size=8))
def test_rows_that_change_places_or_signs_change_the_digest(order: list[int], flipped: list[bool]) -> None:
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in flipped]).bfloat16()
    other = rows[torch.tensor(order)] * signs[:, None]
    assert (digest(other) == digest(rows)) == torch.equal(other, rows)


def test_a_view_counts_for_what_it_shows() -> None:
    tensor = torch.arange(40, dtype=torch.bfloat16)
    assert digest(tensor[1:7]) == digest(tensor[1:7].clone())
    assert digest(tensor.view(5, 8).T) == digest(tensor.view(5, 8).T.contiguous()) != digest(tensor)


def test_settings_names_and_shapes_count() -> None:
    module = nn.Linear(4, 2, bias=False)
    known = fingerprint(["a", 1], [module])
    assert known == fingerprint(["a", 1], [module]) != fingerprint(["a", 2], [module])
    assert fingerprint(["a", 1], [nn.ModuleDict({"x": module})]) != known
    turned = nn.Linear(2, 4, bias=False)
    turned.weight = nn.Parameter(module.weight.detach().reshape(4, 2))
    assert fingerprint(["a", 1], [turned]) != known


def test_it_is_the_same_everywhere() -> None:
    """Stored KVs are found again by it, also by a replica with another version of torch."""
    assert digest(torch.arange(6, dtype=torch.int16)).hex() == "1688048fe9da249c"
