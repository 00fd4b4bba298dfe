"""The registry of rows."""

from __future__ import annotations

import pytest

from server.bench.methods import METHODS, PLAIN, choose_methods


def test_names_are_one_each() -> None:
    names = [method.name for method in (*METHODS, PLAIN)]
    assert len(set(names)) == len(names)


def test_choice() -> None:
    assert choose_methods([]) == METHODS
    assert [method.name for method in choose_methods(["low", "attention-[12]"])] == [
        "low",
        "attention-1",
        "attention-2",
    ]
    server = [method.name for method in choose_methods([], local=False)]
    assert {"low", "high", "attention-3", "oracle", "random", "plain"} <= set(server)
    assert not {"uniform-8", "cosine-3", "stride"} & set(server)  # these need the model in the process
    assert choose_methods([], local=False, dials=False) == [PLAIN]


@pytest.mark.parametrize(
    ("patterns", "where", "message"),
    [
        (["low", "nothing"], {}, "no method is called 'nothing'; there are low, "),
        (["stride"], {"local": False}, "none of these methods can be asked here; there are low, "),
        (["low"], {"local": False, "dials": False}, "none of these methods can be asked here; there are plain"),
    ],
)
def test_an_empty_choice_is_refused(patterns: list[str], where: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_methods(patterns, **where)
