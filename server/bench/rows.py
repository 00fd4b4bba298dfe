"""Which rows a run of the quality benchmark has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from server.bench.compressor_methods import COMPRESSOR_METHODS
from server.bench.methods import METHODS, PLAIN, Method
from server.models.base import VideoModel
from server.models.families.one_pass import OnePassModel

EVERY_METHOD: tuple[Method, ...] = (*METHODS, *COMPRESSOR_METHODS, PLAIN)
"""In the table's order; a name stands for one method only."""


def methods_here(model: VideoModel) -> list[Method]:
    """What can be asked of a model in this process."""
    return [*METHODS, *(COMPRESSOR_METHODS if isinstance(model, OnePassModel) else ())]


def methods_at_server(*, dials: bool) -> list[Method]:
    """What can be asked of a server, which takes ``dials`` or not."""
    return [*(one for one in METHODS if one.remote and dials), PLAIN]


def choose_methods(patterns: Sequence[str], offered: Sequence[Method]) -> list[Method]:
    """The methods whose names match one of ``patterns`` (shell style; none given: all) among those ``offered``.

    Raises ValueError for a pattern that matches nothing and for an empty choice.
    """
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in EVERY_METHOD):
            raise ValueError(f"no method is called {pattern!r}; there are {_kinds(offered)}")
    chosen = [one for one in offered if not patterns or any(fnmatchcase(one.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"none of these methods can be asked here; there are {_kinds(offered)}")
    return chosen


def _kinds(methods: Sequence[Method]) -> str:
    """Their names, those that begin alike as one pattern."""
    kinds = Counter(method.name.partition("-")[0] for method in methods)
    names = {method.name.partition("-")[0]: method.name for method in methods}
    return ", ".join(f"{kind}*" if count > 1 else names[kind] for kind, count in kinds.items())
