"""What tells one model's KVs from another's: its settings and every bit of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

_BLOCK = 1 << 16
"""Words that are summed up together."""
_WORDS_AT_ONCE = {"cpu": 1 << 18}
_MOST_WORDS_AT_ONCE = 1 << 24
"""Elsewhere. On the CPU products must stay in its cache."""


def fingerprint(settings: Iterable[object], modules: Iterable[nn.Module]) -> str:
    """SHA-256 hex over ``settings``, by their ``repr``, and the weights, by name; the same on every device.

    The weights enter as :func:`digest` sums them up, where they lie: SHA-256 over the 16 GB of a 7B model takes a way
    through the host and ten seconds of one core. A sample of the numbers would do it as fast, but models that differ
    elsewhere would share KVs. The sums take in every bit: one word that changes shows for certain, and of several in
    a block fewer than one change in 2^31 escapes. That is no proof against weights that were made to collide, which
    whoever picks the weights could only use against their own store.
    """
    whole = hashlib.sha256(repr(tuple(settings)).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            whole.update(digest(tensor))
    return whole.hexdigest()


def digest(tensor: Tensor) -> bytes:
    """Of a tensor's bits: for every block of _BLOCK 32-bit words the sum, modulo 2^64, of each times its place's odd
    factor."""
    words = _words(tensor.detach())
    factors = _factors(words.device)
    size = _WORDS_AT_ONCE.get(words.device.type, _MOST_WORDS_AT_ONCE)
    whole = len(words) // _BLOCK * _BLOCK
    products = factors.new_empty((min(size, whole) // _BLOCK, _BLOCK))
    sums = []
    for part in torch.split(words[:whole].view(-1, _BLOCK), size // _BLOCK):
        sums.append(torch.mul(part, factors, out=products[: len(part)]).sum(-1))
    sums.append((words[whole:] * factors[: len(words) - whole]).sum(-1, keepdim=True))
    return torch.cat(sums).cpu().numpy().tobytes()


def _words(tensor: Tensor) -> Tensor:
    """Its bytes as int32 [n], with zeros behind them to a whole word."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    if len(flat) % 4 or flat.storage_offset() % 4:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).clone()
    return flat.view(torch.int32)


@lru_cache(maxsize=2)
def _factors(device: torch.device) -> Tensor:
    """int64 [_BLOCK], as good as random and fixed for good."""
    drawn = np.frombuffer(hashlib.shake_256(b"x2l").digest(8 * _BLOCK), "<i8") | 1
    return torch.from_numpy(drawn).to(device)
