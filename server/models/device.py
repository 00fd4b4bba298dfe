"""Between the host and a GPU, without anybody waiting who has something else to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

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
    """int64 [n] on ``device``: where ``mask`` [tokens], bool on the CPU, is True; nobody writes to it. A mask on a GPU
    would be waited for, to tell how many there are."""
    return _indices(mask.numpy().tobytes(), device)


@lru_cache(maxsize=64)
def kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [n] on ``device``, brought there once; nobody writes to it."""
    with torch.inference_mode(False):  # whoever asks next may be training
        return to_device(torch.tensor(values), device)


@lru_cache(maxsize=64)
def _indices(mask: bytes, device: torch.device) -> Tensor:
    """Kept, because the chunks of a video are masked alike."""
    with torch.inference_mode(False):
        return to_device(torch.frombuffer(bytearray(mask), dtype=torch.bool).nonzero()[:, 0], device)


@lru_cache
def _arrivals(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: what goes leaves its memory to its own stream alone, and torch has 32."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Arriving:
    """A tensor on its way to a device."""

    tensor: Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def at(cls, device: torch.device, tensor: Tensor) -> Self:
        """Brings there what lies on the CPU, beside all other work: nothing else stands behind the copy."""
        if device.type != "cuda":
            return cls(tensor, None)
        stream = _arrivals(device)
        with torch.cuda.stream(stream):
            return cls(to_device(tensor, device), stream.record_event())

    def take(self) -> Tensor:
        """The tensor, for the calling thread's stream; see :func:`await_on_device`."""
        await_on_device(self.ready, self.tensor)
        return self.tensor


def await_on_device(ready: torch.cuda.Event | None, *tensors: Tensor) -> None:
    """Makes the calling thread's stream wait for ``tensors``, which are there with ``ready``, while the thread goes
    on."""
    if ready is None:
        return
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(ready)
    for tensor in tensors:
        tensor.record_stream(stream)  # its memory must outlive what that stream does with it


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
