from __future__ import annotations

import pytest

from server.bench.grade import is_right


@pytest.mark.parametrize(
    ("kind", "expected", "reply", "right"),
    [
        ("code", "K7X", "The code is k7x.", True),
        ("code", "K7X", "“Ｋ７Ｘ”", True),
        ("code", "K7X", "K7XY", False),
        ("code", "K7X", "", False),
        ("exist", "Yes", "Yes, at 00:12.", True),
        ("exist", "No", "No. Yes.", True),
        ("exist", "No", "yes... no", False),
        ("exist", "No", "Not sure", False),
        ("order", "red star", "The blue moon comes at 00:10, so first is the red star.", True),
        ("order", "red star", "The red star, not the blue moon.", False),
        ("order", "red star", "I do not know", False),
        ("time", "00:45", "It appears at 00:45.", True),
        ("time", "00:45", "It appears at 10:45.", False),
        ("count", "3", "3 times", True),
        ("count", "3", "13 times", False),
        ("object", "green ring", "A GREEN ring!", True),
        ("multi", "K7X and P3M", "K7X, and P3M", True),
    ],
)
def test_rule(kind: str, expected: str, reply: str, right: bool) -> None:
    assert is_right(kind, expected, reply) is right
