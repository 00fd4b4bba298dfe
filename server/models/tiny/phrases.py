"""Random question texts for training: a sentence of the grammar, then the noise of real users."""

from __future__ import annotations

import re
from random import Random

from server.models.tiny import grammar
from server.models.tiny.language import PLAIN, expand

_ARTICLES = {"the", "a", "an", "{a1}", "{a2}", "that", "this"}
_NAMED = re.compile(r"\b(PLATE|NAMED)([12]?)\b")
_BY_FORM = {"code_full": "full", "code_color": "color", "code_place": "place", "multi_full": "full"}


def sentence(form: str, rng: Random) -> str:
    """A question of the form with its blanks, commas at its pauses; one in ten in the generator's own wording."""
    if form in PLAIN and rng.random() < 0.1:
        return rng.choice(PLAIN[form])
    template = rng.choice(rng.choice(grammar.TEMPLATES[form]))
    kind = _BY_FORM.get(form) or ("place" if form == "multi_place" else rng.choice(("full", "color", "place")))
    time = "{short1}" if form == "object_short" else "{time1}"

    def plate(match: re.Match[str]) -> str:
        rule = "of" if match[1] == "PLATE" else "named"
        text = expand(f"${rule}_{kind}1", rng, grammar.RULES)
        return text if match[2] != "2" else re.sub(r"\{(obj|lab|p|a)1", r"{\g<1>2", text)

    template = expand(template, rng, grammar.RULES)
    return re.sub(r"\bTIME\b", time, _NAMED.sub(plate, template))


def roughen(text: str, rng: Random) -> str:
    """``text`` as a hurried or polite user types it: padding, dropped articles, stray words at pauses, a rare typo."""
    words = text.split()
    if rng.random() < 0.12:
        share = rng.choice((0.5, 1.0))
        words = [word for word in words if word not in _ARTICLES or rng.random() > share]
    if rng.random() < 0.15:
        stray = [rng.choice(_FILLERS) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
        pauses = [0, len(words), *(i for i, word in enumerate(words) if word == ",")]
        at = rng.choice(pauses)
        words[at:at] = stray
    if rng.random() < 0.04:
        literal = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
        if literal:
            at = rng.choice(literal)
            words[at] = _typo(words[at], rng)
    for _ in range(rng.choices((0, 1, 2), (0.6, 0.32, 0.08))[0]):
        words[:0] = expand(rng.choice(grammar.PREFIXES).join("()"), rng, {}).split()
    if rng.random() < 0.3:
        words += expand(rng.choice(grammar.SUFFIXES).join("()"), rng, {}).split()
    return " ".join(word for word in words if word != ",")


def _typo(word: str, rng: Random) -> str:
    at = rng.randrange(len(word) - 1)
    if rng.random() < 0.5:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


_FILLERS = grammar.FILLERS.split()
