from __future__ import annotations

import pytest
import torch

from server.models.device import Arriving


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_arrives_takes_the_memory_of_what_went() -> None:
    device, pixels = torch.device("cuda", 0), torch.full((30 << 20,), 7, dtype=torch.uint8)
    reserved = []
    for _ in range(6):
        assert Arriving.at(device, pixels).take().eq(7).all()
        torch.cuda.synchronize(device)
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[-1] == reserved[1]


def test_without_a_gpu_it_is_there_already() -> None:
    pixels = torch.zeros(3)
    assert Arriving.at(torch.device("cpu"), pixels).take() is pixels
