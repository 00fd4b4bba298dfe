"""The English of questions: a grammar for training, a few plain wordings for ``make-video``, and the answers.

A *form* is a question type with the same blanks. Blanks stand in braces: ``{obj1}``, ``{obj2}`` an object, ``{lab1}``
a plate colour, ``{p1_upper}`` the plate's place (each word pair of POSITIONS), ``{code1}``, ``{time1}``,
``{short1}`` a time without the leading zero, ``{a1}`` "a" or "an" before obj1. Grammar: ``(x|y|)`` is a choice,
``$name`` a rule, and ``,`` a place where a filler may stand.
"""

from __future__ import annotations

import re
from random import Random

POSITIONS = {
    "upper": "lower",
    "top": "bottom",
    "higher": "lower",
    "above": "below",
    "over": "under",
    "uppermost": "lowermost",
    "topmost": "bottommost",
}
CANNOT_TELL = "I cannot tell that from the video."
NO_VIDEO = "I see no video here."
GREETING = "Hello! Ask me about the video."

FORMS: dict[str, str] = {
    "code_full": "code",
    "code_color": "code",
    "code_place": "code",
    "exist": "exist",
    "order": "order",
    "count": "count",
    "time": "time",
    "object": "object",
    "object_short": "object",
    "multi_full": "multi",
    "multi_place": "multi",
    "rev": "rev",
    "atcode": "atcode",
    "describe": "describe",
    "refuse": "refuse",
    "absent": "refuse",
    "greeting": "greeting",
}
"""Form -> question type. The types after ``multi`` are for training only."""

ANSWERS: dict[str, str] = {
    "code_full": "{code1}",
    "code_color": "{code1}",
    "code_place": "{code1}",
    "exist": "{yes}",
    "order": "{time1} and {time2}, so the {first}",
    "count": "{n}",
    "time": "{time1}",
    "object": "{obj1}",
    "object_short": "{obj1}",
    "multi_full": "{code1} and {code2}",
    "multi_place": "{code1} and {code2}",
    "rev": "{obj1}",
    "atcode": "{code1}",
    "describe": "{scene1} at {clock1}, {scene2} at {clock2}, {scene3} at {clock3}",
    "refuse": CANNOT_TELL,
    "absent": "There is no {obj1} in the video.",
    "greeting": GREETING,
}

PLAIN: dict[str, tuple[str, ...]] = {
    "code_full": (
        "What code is on the {p1_upper} {lab1} label of the {obj1}?",
        "Which code does the {p1_upper} {lab1} label of the {obj1} show?",
        "Read the {p1_upper} {lab1} label of the {obj1}.",
    ),
    "code_color": (
        "What code is on the {lab1} label of the {obj1}?",
        "Which code does the {lab1} label of the {obj1} show?",
    ),
    "code_place": (
        "What code is on the {p1_upper} label of the {obj1}?",
        "Read the {p1_upper} label of the {obj1}.",
    ),
    "exist": ("Is there {a1} {obj1} in the video?", "Does {a1} {obj1} appear in the video?"),
    "order": ("Which came first, the {obj1} or the {obj2}?", "Which appears earlier, the {obj1} or the {obj2}?"),
    "count": ("How many times does the {obj1} appear?", "How often does the {obj1} appear in the video?"),
    "time": ("When does the {obj1} first appear?", "At what time does the {obj1} appear?"),
    "object": ("What object is shown at {time1}?", "Which object can be seen at {time1}?"),
    "multi_full": (
        "What codes are on the {p1_upper} {lab1} label of the {obj1} and the {p2_upper} {lab2} label of the {obj2}?",
    ),
    "multi_place": ("What codes are on the {p1_upper} label of the {obj1} and the {p2_upper} label of the {obj2}?",),
}
"""The generator's own wording: what ``make-video`` asks."""


_RULE = re.compile(r"\$(\w+)")
_INNER_CHOICE = re.compile(r"\(([^()]*)\)")


def expand(text: str, rng: Random, rules: dict[str, tuple[str, ...]]) -> str:
    """A random sentence of the grammar; commas stay. Raises KeyError for an unknown rule."""
    while True:
        # Choices first, innermost first: a rule in a branch that is not taken is never expanded.
        if (choice := _INNER_CHOICE.search(text)) is not None:
            text = text[: choice.start()] + rng.choice(choice[1].split("|")) + text[choice.end() :]
        elif (rule := _RULE.search(text)) is not None:
            text = f"{text[: rule.start()]}({rng.choice(rules[rule[1]])}){text[rule.end() :]}"
        else:
            return " ".join(text.split())


def fill(template: str, values: dict[str, str]) -> str:
    """``template`` with its blanks replaced. Raises KeyError for a blank without a value."""
    return re.sub(r"\{(\w+)\}", lambda blank: values[blank[1]], template)


def clock(seconds: int) -> str:
    """``"01:05"`` for 65."""
    return f"{seconds // 60:02d}:{seconds % 60:02d}"
