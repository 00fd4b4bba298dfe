"""Names that others gave cannot steer a terminal or burst a table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from server.cli.files import print_files
from server.cli.text import elided, printable


def test_what_steers_is_shown() -> None:
    assert printable("a\x1b[31mb\n\x07\x9b\u202e\u2028") == r"a\x1b[31mb\n\x07\x9b\u202e\u2028"
    assert printable("a\tb\nc\x1b", keep="\n\t") == "a\tb\nc\\x1b"
    for name in ("urlaub – Köln.mp4", "動画.mp4", "[bold]:star:", "نیم\u200cفاصله"):
        assert printable(name) == name


@given(st.text(), st.integers(1, 40))
def test_no_text_is_wider_than_its_room(text: str, width: int) -> None:
    shown = elided(printable(text), width)
    assert cell_len(shown) <= width
    assert shown == printable(text) or shown.endswith("…")


def record(filename: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "file-0123456789abcdef01234567",
        "filename": filename,
        "status": "processed",
        "status_details": None,
        "bytes": 1_000_000,
        "expires_at": None,
        "pinned": False,
        "video": None,
    } | fields


@pytest.mark.parametrize(("room", "most"), [(None, 145), (150, 150), (80, 110)])
def test_one_long_name_does_not_widen_the_table(
    room: int | None, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record("a" * 3000), record("[red]:star:\x1b[31m.mp4")]
    print_files(records, room)
    header, long, short, total = capsys.readouterr().out.splitlines()
    assert max(map(len, (header, long, short, total))) <= most
    assert "aaaa… processed" in " ".join(long.split())
    if room != 80:
        assert r"[red]:star:\x1b[31m.mp4 " in short


def test_what_is_wrong_with_a_file_stands_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        record("a", status="error", status_details="The video is\ndamaged."),
        record("b"),
        record("c", status_details="gone " * 100),
    ]
    print_files(records, 120)
    _, _, damaged, whole, _, gone, total = capsys.readouterr().out.splitlines()
    assert damaged == r"  The video is\ndamaged."
    assert whole.split()[1:3] == ["b", "processed"] and total.startswith(" total 3.0 MB")
    assert gone.startswith("  gone gone") and gone.endswith("…") and len(gone) <= 120
