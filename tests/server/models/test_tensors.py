from __future__ import annotations

import torch
from torch import nn

from server.models.tensors import load_into, without_values


class Modules(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv2d(1, 2, 2))


def test_modules_without_values_get_those_of_others() -> None:
    with without_values():
        hollow = Modules()
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    whole = Modules()
    assert all(parameter.any() for parameter in whole[0].parameters()), "outside, modules are initialised as ever"
    load_into(hollow, whole.state_dict())
    ids = torch.arange(5)
    assert torch.equal(hollow[1](hollow[0](ids)), whole[1](whole[0](ids)))
