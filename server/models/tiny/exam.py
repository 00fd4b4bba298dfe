"""Questions about one synthetic video, with answers and where they are found: what ``make-video`` writes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from server.models.tiny.language import ANSWERS, FORMS, PLAIN, clock, fill
from server.models.tiny.world import CHUNK_TICKS, PLATE_COLORS, SYMBOLS, Script, object_name

EXAM = ("code",) * 6 + ("exist", "exist", "order", "order", "time", "time", "object", "object", "count", "multi")
"""The types of a video's questions, in order; one ``exist`` is answered Yes and one No."""


@dataclass(frozen=True, slots=True)
class ExamQuestion:
    """A question and the seconds [start, end) whose ticks hold its answer, one span an object (none for a No)."""

    question: str
    answer: str
    type: str
    spans: tuple[tuple[int, int], ...]

    @property
    def chunks(self) -> list[int]:
        """Zero-based indices of the chunks that hold the answer, ascending."""
        return sorted({tick // CHUNK_TICKS for start, end in self.spans for tick in range(start, end)})


class Examiner:
    """Asks about the first video of a script. Deterministic in the script and ``rng``."""

    def __init__(self, script: Script, rng: Random) -> None:
        self._rng = rng
        self._objects: list[int] = script.objects[0].tolist()
        self._codes: list[list[list[int]]] = script.codes[0].tolist()
        self._plates: list[list[int]] = script.plates[0].tolist()
        self._starts: list[int] = script.starts[0].tolist()
        self._lengths: list[int] = script.lengths[0].tolist()
        self._static: list[bool] = script.static[0].tolist()
        self._absent: list[int] = script.absent[0].tolist()
        self._counted: list[int] = script.counted[0].tolist()
        self._target_starts: list[int] = script.target_starts[0, : int(script.num_targets[0])].tolist()

    def exam(self) -> list[ExamQuestion]:
        """One question for every entry of EXAM, all different, about as many different targets as there are."""
        self._fresh = self._rng.sample(self._target_starts, len(self._target_starts))
        asked: dict[str, ExamQuestion] = {}
        for index, question_type in enumerate(EXAM):
            ask: Callable[[], ExamQuestion] = getattr(self, f"_{question_type}")
            if question_type == "exist" and EXAM[index - 1] == "exist":
                ask = self._exist_no
            for _ in range(1000):
                question = ask()
                if question.question not in asked:
                    break
            asked.setdefault(question.question, question)
        return list(asked.values())

    def _target(self) -> int:
        """First tick of a target's shot, each target once before any comes again."""
        if not self._fresh:
            self._fresh = self._rng.sample(self._target_starts, len(self._target_starts))
        return self._fresh.pop()

    def _shot(self, start: int) -> tuple[int, int]:
        return start, start + self._lengths[start]

    def _ask(self, form: str, values: dict[str, str], *spans: tuple[int, int]) -> ExamQuestion:
        name = values.get("obj1", "")
        values["a1"] = "an" if name[:1] in tuple("aeiou") else "a"
        template = self._rng.choice(PLAIN[form])
        return ExamQuestion(fill(template, values), fill(ANSWERS[form], values), FORMS[form], spans)

    def _plate(self, start: int, number: int) -> tuple[dict[str, str], tuple[int, int], bool, bool]:
        """A plate in the shot: its blanks and span; whether its place alone and its colour alone name its code."""
        tick = start + self._rng.randrange(self._lengths[start])
        place = self._rng.randrange(2)
        label = self._plates[tick][place]
        code = "".join(SYMBOLS[symbol] for symbol in self._codes[tick][place])
        values = {
            f"obj{number}": object_name(self._objects[start]),
            f"lab{number}": list(PLATE_COLORS)[label],
            f"p{number}_upper": ("upper", "lower")[place],
            f"code{number}": code,
        }
        by_place = self._static[start] or self._lengths[start] == 1
        by_color = all(self._plates[other][1 - place] != label for other in range(*self._shot(start)))
        return values, self._shot(start) if by_place else (tick, tick + 1), by_place, by_color

    def _code(self) -> ExamQuestion:
        values, span, by_place, by_color = self._plate(self._target(), 1)
        form = "code_place" if by_place else "code_color" if by_color and self._rng.random() < 0.5 else "code_full"
        return self._ask(form, values, span)

    def _multi(self) -> ExamQuestion:
        pairs = [(one, two) for one in self._target_starts for two in self._target_starts if one != two]
        last = max(self._target_starts) // CHUNK_TICKS
        apart = [pair for pair in pairs if abs(pair[0] - pair[1]) // CHUNK_TICKS > last // 4]
        one, two = self._rng.choice(apart or pairs)
        first, span1, by_place1, _ = self._plate(one, 1)
        second, span2, by_place2, _ = self._plate(two, 2)
        form = "multi_place" if by_place1 and by_place2 else "multi_full"
        return self._ask(form, first | second, span1, span2)

    def _exist(self) -> ExamQuestion:
        start = self._target()
        return self._ask("exist", {"obj1": object_name(self._objects[start]), "yes": "Yes"}, self._shot(start))

    def _exist_no(self) -> ExamQuestion:
        return self._ask("exist", {"obj1": object_name(self._rng.choice(self._absent)), "yes": "No"})

    def _order(self) -> ExamQuestion:
        one, two = self._rng.sample(self._target_starts, 2)
        values = {
            "obj1": object_name(self._objects[one]),
            "obj2": object_name(self._objects[two]),
            "time1": clock(one),
            "time2": clock(two),
            "first": object_name(self._objects[min(one, two)]),
        }
        question = self._ask("order", values, self._shot(one), self._shot(two))
        # The reply is judged by the object it names last; the two times before it are the model's own way.
        return ExamQuestion(question.question, values["first"], "order", question.spans)

    def _time(self) -> ExamQuestion:
        start = self._target()
        values = {"obj1": object_name(self._objects[start]), "time1": clock(start)}
        return self._ask("time", values, self._shot(start))

    def _object(self) -> ExamQuestion:
        tick = self._rng.randrange(len(self._objects))
        values = {"obj1": object_name(self._objects[tick]), "time1": clock(tick)}
        return self._ask("object", values, (tick, tick + 1))

    def _count(self) -> ExamQuestion:
        shots = sorted(set(self._starts))
        shown = [[start for start in shots if self._objects[start] == wanted] for wanted in self._counted]
        # A short video may hold no repeated object: then one that appears once is counted.
        repeated = [starts for starts in shown if len(starts) > 1] or [[start] for start in self._target_starts]
        starts = self._rng.choice(repeated)
        values = {"obj1": object_name(self._objects[starts[0]]), "n": str(len(starts))}
        return self._ask("count", values, *(self._shot(start) for start in starts))
