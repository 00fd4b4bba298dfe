"""When a reply to a synthetic question counts as right."""

from __future__ import annotations

import re
import unicodedata

from server.models.tiny.world import COLORS, SHAPES

_OBJECT = re.compile(rf"\b(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})\b")
_YES_NO = re.compile(r"\b(?:yes|no)\b")


def is_right(question_type: str, expected: str, reply: str) -> bool:
    """Whether ``reply`` answers with ``expected``.

    After NFKC, casefolding and removing punctuation other than ``:``, the expected answer stands in the reply as whole
    words. Of an ``order`` reply its last named object counts, of an ``exist`` reply its first yes or no.
    """
    answer, said = _plain(expected), _plain(reply)
    if question_type == "exist":
        said = next(iter(_YES_NO.findall(said)), "")
    elif question_type == "order":
        said = (named_objects(said) or [""])[-1]
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said) is not None


def named_objects(text: str) -> list[str]:
    """The objects that a text in small letters names, in their order."""
    return _OBJECT.findall(text)


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(char for char in folded if char == ":" or not unicodedata.category(char).startswith("P"))
    return " ".join(kept.split())
