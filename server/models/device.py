"""Between the host and a GPU, without anybody waiting who has something else to do."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """What lies on the CPU, copied to memory that ``device`` can copy from by itself, and that torch keeps until it
    has. A store's pinned memory will not do: it is another blob's as soon as nothing here refers to it."""
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor) if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What lies on the CPU, pinned already or not, on ``device``. A GPU copies it when it gets there: from pinned
    memory, because whoever copies from other memory waits until the GPU has done all that it was asked for before."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = pinned(tensor, device)
    return tensor.to(device, non_blocking=True)


def indices(mask: Tensor, device: torch.device) -> Tensor:
    """int64 [n] on ``device``: where ``mask`` [tokens], on the CPU, is True. A mask on a GPU would be waited for, to
    tell how many there are."""
    return to_device(mask.nonzero()[:, 0], device)


def asked_so_far(device: torch.device) -> torch.cuda.Event | None:
    """What tells when ``device`` has done all that this thread has asked of it; None where that is now."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def to_host(tensor: Tensor, made: torch.cuda.Event | None) -> Tensor:
    """On the CPU, what is there when ``made`` has come about. Waits for it: on a thread of its own, and on a stream of
    its own, so that nobody's work stands behind the copy. The caller holds the tensor until then."""
    if made is None:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        stream.wait_event(made)
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return host
