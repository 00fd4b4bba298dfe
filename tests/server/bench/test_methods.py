"""The registry of rows."""

from __future__ import annotations

import pytest

from server.bench.methods import METHODS, PLAIN, Method
from server.bench.rows import EVERY_METHOD, choose_methods, methods_at_server


def test_names_are_one_each() -> None:
    names = [method.name for method in EVERY_METHOD]
    assert len(set(names)) == len(names)


def test_choice() -> None:
    assert choose_methods([], METHODS) == METHODS
    assert [method.name for method in choose_methods(["low", "attention-[12]"], METHODS)] == [
        "low",
        "attention-1",
        "attention-2",
    ]
    server = [method.name for method in choose_methods([], methods_at_server(dials=True))]
    assert {"low", "high", "attention-3", "oracle", "random", "plain"} <= set(server)
    assert not {"uniform-8", "cosine-3", "stride"} & set(server)  # these need the model in the process
    assert choose_methods([], methods_at_server(dials=False)) == [PLAIN]


@pytest.mark.parametrize(
    ("patterns", "offered", "message"),
    [
        (["low", "nothing"], METHODS, "no method is called 'nothing'; there are low, uniform\\*, "),
        (["stride"], methods_at_server(dials=True), "none of these methods can be asked here; there are low, "),
        (["low"], methods_at_server(dials=False), "none of these methods can be asked here; there are plain"),
    ],
)
def test_an_empty_choice_is_refused(patterns: list[str], offered: list[Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_methods(patterns, offered)
