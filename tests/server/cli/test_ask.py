"""What is missing from ``x2l ask`` is said before anybody is asked."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from server.cli import app as x2l


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file-0123"], "the question is missing"),
        (["file-0123", "file-4567"], "the question is missing"),
        (["Is there an orange moon?"], "the file's id is missing"),
        (["file-0123", " "], "the question is empty"),
        ([], "Missing argument"),
    ],
)
def test_what_is_missing_is_said(words: list[str], message: str) -> None:
    ran = CliRunner().invoke(x2l, ["ask", *words])
    assert ran.exit_code == 2
    assert message in " ".join(ran.stderr.split())


def test_a_bad_choice_is_told_in_plain_words() -> None:
    ran = CliRunner().invoke(x2l, ["ask", "file-0123", "Is there a moon?", "--mode", "foo"])
    assert ran.exit_code == 2
    assert "'--mode': 'foo' is not one of 'auto', 'low', 'high'" in " ".join(ran.stderr.split())


def test_the_version() -> None:
    ran = CliRunner().invoke(x2l, ["--version"])
    assert ran.exit_code == 0 and ran.stdout.startswith("x2l 0.")
