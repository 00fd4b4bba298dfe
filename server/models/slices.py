"""Long work in slices, between which others may have their turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
Slices = Generator[None, None, T]
"""Work that pauses at every ``yield``, and its result. Whoever does not want it any more closes it."""

_BLOCKS_A_SLICE = 2
"""Of a vision tower: together they cost a GPU less than a layer of the language model behind it, and the thread that
asks it for them about as much, where that has to do with the interpreter's other threads."""


def whole(slices: Slices[T]) -> T:
    """All of them, one right after the other."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: T = end.value
            return result


def through(call: Callable[[], T], blocks: Sequence[nn.Module]) -> Slices[T]:
    """``call()``, which runs each of ``blocks`` once, in their order and each on the tensor that the one before gave:
    with a pause before every few blocks.

    The code around the blocks is somebody else's, and cannot pause. So it runs twice: first past the blocks, which only
    note what else they are given, and at the end with what they have given by then.
    """
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*args: Any, **others: Any) -> Any:
        given.append((args, others))
        return args[0]

    with _acting(blocks, [note] * len(blocks)):
        call()
    made: list[Any] = []
    for (args, others), block in zip(given, blocks, strict=True):
        if len(made) % _BLOCKS_A_SLICE == 0:
            yield
        made.append(block(made[-1] if made else args[0], *args[1:], **others))
    outputs = iter(made)
    with _acting(blocks, [lambda *_, **__: next(outputs)] * len(blocks)):
        return call()


@contextmanager
def _acting(blocks: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks that do something else for a while; whatever hangs on their calls sees no difference."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
