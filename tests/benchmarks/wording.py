"""How much answers depend on the wording of a question, through HTTP.

``python tests/benchmarks/wording.py [--seeds 500-519] [--per-phrasing 3] [--out RESULT.json]``

Part one: every held-out phrasing of ``phrasings.json``, filled with the facts of questions about fresh mp4 videos,
against the generator's own wording of the very same questions. Part two: the generator's wording in odd case, without
punctuation and with polite padding. Default settings throughout.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from common import Tally, circumstances, criterion, make_videos, parser, print_criteria, print_table, write
from live_server import Job, ask_all, serving, upload
from openai import OpenAI

from server.bench.grade import is_right
from server.models.tiny.exam import ExamQuestion
from server.models.tiny.language import fill
from server.models.tiny.make_video import plan_video
from server.models.tiny.world import COLORS, PLATE_COLORS, SHAPES, SYMBOLS, Script

PHRASINGS = Path(__file__).parent / "phrasings.json"
_OBJECT = re.compile(rf"\b(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})\b")


@dataclass(frozen=True)
class Exam:
    """A question, the file it is about, and what fills the blanks of its type's phrasings."""

    file_id: str
    question: ExamQuestion
    blanks: Mapping[str, str]


def facts(question: ExamQuestion, script: Script) -> dict[str, str]:
    """The blanks of held-out phrasings: object, position and label, with the suffixes _a and _b where there are two."""
    objects = _OBJECT.findall(question.question)
    if question.type == "object":
        return {"time": re.findall(r"\b\d\d:\d\d\b", question.question)[0]}
    if question.type == "order":
        return {"a": objects[0], "b": objects[1]}
    if question.type not in ("code", "multi"):
        return {"object": objects[0]}
    blanks: dict[str, str] = {}
    suffixes = ("_a", "_b") if question.type == "multi" else ("",)
    codes = question.answer.split(" and ")
    for suffix, name, code, span in zip(suffixes, objects, codes, question.spans, strict=True):
        position, label = _plate(script, code, span)
        blanks |= {f"object{suffix}": name, f"position{suffix}": position, f"label{suffix}": label}
    return blanks


def _plate(script: Script, code: str, span: tuple[int, int]) -> tuple[str, str]:
    """The position and the colour of the plate that shows the code."""
    for tick in range(*span):
        for place, position in enumerate(("upper", "lower")):
            if "".join(SYMBOLS[symbol] for symbol in script.codes[0, tick, place].tolist()) == code:
                return position, list(PLATE_COLORS)[int(script.plates[0, tick, place])]
    raise ValueError(f"no plate shows {code} in seconds {span}")


def _without_punctuation(text: str) -> str:
    return "".join(char for char in text if char == ":" or not unicodedata.category(char).startswith("P"))


def _random_case(text: str) -> str:
    rng = Random(text)
    return "".join(rng.choice((char.lower(), char.upper())) for char in text)


VARIANTS: dict[str, Callable[[str], str]] = {
    "UPPER CASE": str.upper,
    "lower case": str.lower,
    "rAnDoM cAsE": _random_case,
    "no punctuation": _without_punctuation,
    "please": lambda text: f"{text.rstrip('?.')}, please?",
    "Please, ...": lambda text: f"Please, {text}",
    "... Thanks a lot!": lambda text: f"{text} Thanks a lot!",
    "Hi there, ...": lambda text: f"Hi there, {text}",
    "Hello! ... Thank you!": lambda text: f"Hello! {text} Thank you very much!",
}


def answers(client: OpenAI, asked: Sequence[tuple[Exam, str]], concurrency: int) -> list[tuple[bool, str]]:
    """Whether each text got the exam question's answer, and the reply."""
    replies = ask_all(client, [Job(exam.file_id, text) for exam, text in asked], concurrency)
    return [
        (is_right(exam.question.type, exam.question.answer, reply.text), reply.text)
        for (exam, _), reply in zip(asked, replies, strict=True)
    ]


def compare_phrasings(
    client: OpenAI, exams: Sequence[Exam], own: Sequence[bool], per_phrasing: int, concurrency: int
) -> dict[str, Any]:
    """Every held-out phrasing with the facts of ``per_phrasing`` questions, paired with the same questions' ``own``."""
    phrasings = json.loads(PHRASINGS.read_text())
    rng = Random(0)
    pairs: list[tuple[int, str]] = []
    for kind in sorted({exam.question.type for exam in exams}):
        numbers = [number for number, exam in enumerate(exams) if exam.question.type == kind]
        deck: list[int] = []
        for template in phrasings[kind] * per_phrasing:
            deck = deck or rng.sample(numbers, len(numbers))
            pairs.append((deck.pop(), template))
    asked = [(exams[number], fill(template, dict(exams[number].blanks))) for number, template in pairs]
    held_out, generator, wrong = Tally(), Tally(), []
    replies = answers(client, asked, concurrency)
    for (number, _), (exam, _), (right, reply) in zip(pairs, asked, replies, strict=True):
        held_out.add(exam.question.type, right)
        generator.add(exam.question.type, own[number])
        if own[number] and not right:
            # Without its text: who reads results must not come to know the phrasings.
            wrong.append({"type": exam.question.type, "answer": exam.question.answer, "reply": reply})
    return {
        "phrasings_per_type": {kind: len(phrasings[kind]) for kind in held_out.asked},
        "held_out": held_out.counts(),
        "generator": generator.counts(),
        "difference": {
            kind or "all": round(held_out.share(kind) - generator.share(kind), 4)
            for kind in (*sorted(held_out.asked), None)
        },
        "wrong_in_held_out_only": wrong,
    }


def compare_variants(
    client: OpenAI, exams: Sequence[Exam], own: Sequence[bool], concurrency: int
) -> dict[str, dict[str, Any]]:
    """Every variant of the generator's wording against that wording itself."""
    variants = {}
    for name, change in VARIANTS.items():
        texts = [change(exam.question.question) for exam in exams]
        after = [right for right, _ in answers(client, [*zip(exams, texts, strict=True)], concurrency)]
        variants[name] = {
            "right_of_asked": [sum(after), len(after)],
            "difference": round((sum(after) - sum(own)) / len(own), 4),
            "lost": [text for text, before, now in zip(texts, own, after, strict=True) if before and not now],
        }
    return variants


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    videos = make_videos(folder, given.seeds, given.chunks)
    exams: list[Exam] = []
    num_varied = 0
    with serving() as live, live.client() as client:
        files = upload(client, videos)
        for number, video in enumerate(videos, start=1):
            plan = plan_video(video.seed, given.chunks)
            exams += [Exam(files[video.path].id, q, facts(q, plan.script)) for q in plan.questions]
            num_varied = len(exams) if number <= given.varied else num_varied
        own = [right for right, _ in answers(client, [(e, e.question.question) for e in exams], given.concurrency)]
        phrasings = compare_phrasings(client, exams, own, given.per_phrasing, given.concurrency)
        variants = compare_variants(client, exams[:num_varied], own[:num_varied], given.concurrency)
    return {
        "phrasings": phrasings,
        "generator": {"right_of_asked": [sum(own), len(own)]},
        "variants": variants,
        "criteria": [
            criterion("held-out phrasings against the generator's own", phrasings["difference"]["all"], -0.05),
            *(criterion(f"{name} against plain", entry["difference"], 0.0) for name, entry in variants.items()),
        ],
    }


def main() -> None:
    arguments = parser(__doc__, seeds="500-519")
    arguments.add_argument("--chunks", type=int, default=16)
    arguments.add_argument("--per-phrasing", type=int, default=3, help="questions that each phrasing is asked for [3]")
    arguments.add_argument("--varied", type=int, default=8, help="videos that part two asks about [8]")
    arguments.add_argument("--concurrency", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), given)
    phrasings = result["phrasings"]
    rows = {
        kind: [*("{}/{}".format(*phrasings[side][kind]) for side in ("held_out", "generator")), difference]
        for kind, difference in phrasings["difference"].items()
    }
    print_table("phrasings", ("held out", "own", "difference"), rows)
    print()
    print_criteria(result["criteria"])
    write(circumstances(given) | result, given.out)


if __name__ == "__main__":
    main()
