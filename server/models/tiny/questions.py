"""Training questions as tensors: tokenised rows with blanks, filled from a script by one gather on the device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from server.models.tiny import tokenizer
from server.models.tiny.language import ANSWERS, FORMS, NO_VIDEO, POSITIONS
from server.models.tiny.phrases import roughen, sentence
from server.models.tiny.world import CHUNK_TICKS, COLORS, LOWER, MAX_SHOT_TICKS, PLATE_COLORS, SHAPES, SYMBOLS, Script

MAX_TURN = 48
"""Most tokens of one question with its answer."""
MAX_ROW, MAX_PAST = 112, 3
"""Most tokens of a row, and most turns before its question."""
MAX_SPANS = 4
TYPES = tuple(dict.fromkeys(FORMS.values()))
FINAL_MIX: Mapping[str, float] = {
    "code": 0.25, "exist": 0.10, "order": 0.13, "count": 0.10, "time": 0.11, "object": 0.10, "multi": 0.11,
    "rev": 0.02, "atcode": 0.03, "describe": 0.01, "refuse": 0.03, "greeting": 0.01,
}  # fmt: skip
_FORM_NAMES = (*FORMS, "blind")
_SCENES = 3


def _slots() -> dict[str, int]:
    """Blank's part -> column of the value table."""
    names = [f"{name}_{part}" for name in ("obj1", "obj2", "first", "scene1", "scene2", "scene3") for part in (0, 1)]
    names += [f"{name}_{part}" for name in ("code1", "code2", "spoken1", "spoken2") for part in range(3)]
    names += [f"{name}_{part}" for name in ("time1", "time2", "clock1", "clock2", "clock3") for part in range(4)]
    names += ["lab1", "lab2", "a1", "a2", "yes", "said", "n"]
    names += [f"p{index}_{word}" for index in (1, 2) for word in POSITIONS]
    return {name: column for column, name in enumerate(names)}


SLOTS = _slots()


@dataclass(frozen=True, slots=True)
class Questions:
    """R question rows for each of V videos; a row is question, <assistant>, answer, <end>, padding.

    In a dialogue up to MAX_PAST such turns about the same video stand before it, with <user> between.
    """

    ids: Tensor  # [V, R, MAX_ROW] int64
    answer: Tensor  # [V, R, MAX_ROW] bool: the tokens to learn (answer and <end>)
    types: Tensor  # [V, R] int64 index into TYPES
    chunks: Tensor  # [V, R, MAX_SPANS] int64 chunks that hold the answer, -1 for none
    ticks: Tensor  # [V, R, 2] int64 tick the answer is read at (second: of the second object, else the first's)
    blind: Tensor  # [V, R] bool: asked without a video; the row must not see the memory


class QuestionBank:
    """``rows_per_form`` random phrasings of every form, tokenised once on the CPU (about 1 s a thousand per form)."""

    def __init__(self, rows_per_form: int, seed: int, device: torch.device | str = "cpu") -> None:
        rng = Random(seed)
        rows = [_row(form, rng) for form in _FORM_NAMES for _ in range(rows_per_form)]
        self.rows_per_form = rows_per_form
        self.ids, self.answer, self.past = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))

        def ids_of(*tokens: str) -> Tensor:
            return torch.tensor([_id(token) for token in tokens], device=device)

        def byte_ids(text: str) -> Tensor:
            return ids_of(*(f"<0x{ord(symbol):02X}>" for symbol in text))

        self._color = ids_of(*(f"▁{name}" for name in COLORS))
        self._shape = ids_of(*(f"▁{name}" for name in SHAPES))
        self._label = ids_of(*(f"▁{name}" for name in PLATE_COLORS))
        self._place = ids_of(*(f"▁{word}" for pair in POSITIONS.items() for word in pair)).view(-1, 2)
        self._symbol, self._spoken = byte_ids(SYMBOLS), byte_ids(SYMBOLS.lower())
        self._digit, self._yes_no, self._said = byte_ids("0123456789"), ids_of("▁No", "▁Yes"), ids_of("▁no", "▁yes")
        self._article = ids_of(*("▁an" if name[0] in "aeiou" else "▁a" for name in COLORS))

    def sample(
        self,
        script: Script,
        rows: int,
        generator: torch.Generator,
        mix: Mapping[str, float] = FINAL_MIX,
        blind: Tensor | None = None,
        p_dialogue: float = 0.0,
    ) -> Questions:
        """Draw ``rows`` questions a video on the generator's device (the bank's and the script's).

        ``mix`` weighs the types; a type that a video cannot carry (order with one target, describe with two shots)
        becomes ``code``. ``blind`` [V, rows] marks those to be asked without a video; of the others a share
        ``p_dialogue`` follows one to MAX_PAST other questions and answers.
        """
        device, (videos, ticks) = generator.device, script.objects.shape
        shape = (videos, rows)

        def rand() -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        def below(high: Tensor | int) -> Tensor:
            high = torch.as_tensor(high, device=device)
            return torch.minimum((rand() * high).long(), high - 1)

        def at(table: Tensor, index: Tensor) -> Tensor:
            wide = index.view(*shape, *(1,) * (table.dim() - 2)).expand(*shape, *table.shape[2:])
            return table.gather(1, wide)

        weights = torch.tensor([mix.get(name, 0.0) for name in TYPES], device=device).cumsum(0)
        types = torch.searchsorted(weights / weights[-1], rand(), right=True).clamp(max=len(TYPES) - 1)
        is_type = {name: types == index for index, name in enumerate(TYPES)}
        first_ticks = script.starts == torch.arange(ticks, device=device)
        few = (script.num_targets < 2)[:, None] & (is_type["order"] | is_type["multi"])
        few |= (first_ticks.sum(1) < _SCENES)[:, None] & is_type["describe"]
        types = torch.where(few, TYPES.index("code"), types)
        is_type = {name: types == index for index, name in enumerate(TYPES)}

        # The two shots, a tick in each, and a plate at each tick.
        num_targets = script.num_targets[:, None].expand(shape)
        one = below(num_targets)
        two = (one + 1 + below((num_targets - 1).clamp(min=1))) % num_targets
        start1, start2 = at(script.target_starts, one), at(script.target_starts, two)
        anywhere = is_type["object"] | is_type["rev"] | is_type["atcode"]
        tick1 = torch.where(anywhere, below(ticks), start1 + below(at(script.lengths, start1)))
        tick2 = start2 + below(at(script.lengths, start2))
        start1 = at(script.starts, tick1)
        place1, place2 = below(2), below(2)
        label1 = at(script.plates, tick1).gather(2, place1[..., None])[..., 0]
        label2 = at(script.plates, tick2).gather(2, place2[..., None])[..., 0]
        code1 = _pick_code(at(script.codes, tick1), place1)
        code2 = _pick_code(at(script.codes, tick2), place2)

        # The objects: absent ones for half of exist, all of "absent", a share of count.
        absent = at(script.absent, below(script.absent.shape[1]))
        draw = rand()
        use_absent = (is_type["exist"] & (draw < 0.5)) | (is_type["count"] & (draw < 0.1))
        lost = is_type["refuse"] & (draw < 0.5)
        object1 = torch.where(anywhere, at(script.objects, tick1), at(script.targets, one))
        repeated = at(script.counted, below(script.counted.shape[1]))
        object1 = torch.where(is_type["count"] & (draw > 0.3), repeated, object1)
        object1 = torch.where(use_absent | lost, absent, object1)
        object2 = at(script.targets, two)
        shown = first_ticks[:, None] & (script.objects[:, None] == object1[..., None])  # [V, R, T]
        count = shown.sum(2).clamp(max=9)

        # The form: which words may be left out so that the question stays unique.
        fixed1 = at(script.static, tick1) | (at(script.lengths, tick1) == 1)
        fixed2 = at(script.static, tick2) | (at(script.lengths, tick2) == 1)
        lone = self._lone_color(script, tick1, place1, label1)
        short = is_type["object"] & (tick1 + script.clock[:, None] < 600) & (rand() < 0.2)
        form = torch.tensor([_FORM_NAMES.index(_first_form(name)) for name in TYPES], device=device)[types]
        choose = rand()
        code = is_type["code"]
        for name, when in (
            ("code_color", code & lone & (choose > 0.5)),
            ("code_place", code & fixed1 & (choose < 0.6)),
            ("multi_place", is_type["multi"] & fixed1 & fixed2 & (choose < 0.6)),
            ("object_short", short),
            ("absent", lost),
        ):
            form = torch.where(when, _FORM_NAMES.index(name), form)
        # Where the place alone names the plate at a time, the tick is given: atcode needs no more.
        blind = torch.zeros_like(lost) if blind is None else blind
        form = torch.where(blind & ~is_type["greeting"], _FORM_NAMES.index("blind"), form)

        values = torch.zeros(*shape, len(SLOTS), dtype=torch.long, device=device)

        def put(name: str, *columns: Tensor) -> None:
            for part, column in enumerate(columns):
                values[..., SLOTS[name if name in SLOTS else f"{name}_{part}"]] = column

        def put_object(name: str, index: Tensor) -> None:
            put(name, self._color[index // len(SHAPES)], self._shape[index % len(SHAPES)])

        def put_time(name: str, tick: Tensor) -> None:
            s = tick + script.clock[:, None]
            put(name, *(self._digit[digit] for digit in (s // 600 % 10, s // 60 % 10, s // 10 % 6, s % 10)))

        put_object("obj1", object1)
        put_object("obj2", object2)
        put_object("first", torch.where(start1 < start2, object1, object2))
        for name, tick_code in (("1", code1), ("2", code2)):
            put(f"code{name}", *self._symbol[tick_code].unbind(-1))
            put(f"spoken{name}", *self._spoken[tick_code].unbind(-1))
        put_time("time1", torch.where(anywhere, tick1, start1))
        put_time("time2", start2)
        put("lab1", self._label[label1])
        put("lab2", self._label[label2])
        put("a1", self._article[object1 // len(SHAPES)])
        put("a2", self._article[object2 // len(SHAPES)])
        put("yes", self._yes_no[(~use_absent).long()])
        put("said", self._said[(~use_absent).long()])
        put("n", self._digit[count])
        for row, word in enumerate(POSITIONS):
            put(f"p1_{word}", self._place[row][place1])
            put(f"p2_{word}", self._place[row][place2])
        scenes = torch.where(first_ticks, torch.arange(ticks, device=device), ticks - 1).sort(1).values
        for scene in range(_SCENES):
            tick = scenes[:, scene, None].expand(shape)
            put_object(f"scene{scene + 1}", at(script.objects, tick))
            put_time(f"clock{scene + 1}", tick)

        row_index = form * self.rows_per_form + below(self.rows_per_form)

        def filled(table: Tensor) -> Tensor:
            ids = table[row_index]
            return torch.where(ids < 0, values.gather(2, (-ids - 1).clamp(min=0)), ids)

        in_dialogue = (rand() < p_dialogue) & ~blind
        before = torch.stack([below(max(rows - 1, 1)) for _ in range(MAX_PAST)], -1)  # not the last: it may be blind
        num_before = torch.where(in_dialogue, 1 + below(MAX_PAST), 0)
        ids, answer = _dialogue(filled(self.ids), self.answer[row_index], filled(self.past), before, num_before)
        chunks = self._chunks(script, is_type, form, (tick1, tick2, start1, start2), shown, use_absent | lost | blind)
        second = is_type["order"] | is_type["multi"]
        return Questions(
            ids=ids,
            answer=answer,
            types=types,
            chunks=chunks,
            ticks=torch.stack([tick1, torch.where(second, tick2, tick1)], -1),
            blind=blind,
        )

    @staticmethod
    def _lone_color(script: Script, tick: Tensor, place: Tensor, label: Tensor) -> Tensor:
        """[V, R] whether the other position never has the plate's colour in the shot."""
        videos, rows = tick.shape
        start, length = script.starts.gather(1, tick), script.lengths.gather(1, tick)
        offset = torch.arange(MAX_SHOT_TICKS, device=tick.device)
        others = torch.minimum(start[..., None] + offset, start[..., None] + length[..., None] - 1)
        plates = script.plates.gather(1, others.view(videos, -1, 1).expand(-1, -1, 2)).view(videos, rows, -1, 2)
        other = torch.where(place[..., None] == LOWER, plates[..., 0], plates[..., 1])
        return (other != label[..., None]).all(-1)

    @staticmethod
    def _chunks(
        script: Script,
        is_type: Mapping[str, Tensor],
        form: Tensor,
        moments: tuple[Tensor, Tensor, Tensor, Tensor],
        shown: Tensor,
        nowhere: Tensor,
    ) -> Tensor:
        tick1, tick2, start1, start2 = moments
        none = torch.full_like(tick1, -1)
        whole = is_type["exist"] | (form == _FORM_NAMES.index("code_place"))
        end1 = start1 + script.lengths.gather(1, start1) - 1
        pair1 = torch.where(whole | is_type["order"] | is_type["time"], start1, tick1)
        pair2 = torch.where(is_type["order"], start2, torch.where(is_type["multi"], tick2, none))
        pair2 = torch.where(whole & (end1 // CHUNK_TICKS != start1 // CHUNK_TICKS), end1, pair2)
        chunks = torch.stack([pair1, pair2, none, none], -1)
        last = shown.shape[2]
        appearances = torch.where(shown, torch.arange(last, device=shown.device), last).sort(2).values[..., :MAX_SPANS]
        appearances = torch.where(appearances < last, appearances, -1)
        chunks = torch.where(is_type["count"][..., None], appearances, chunks)
        general = is_type["describe"] | is_type["refuse"] | is_type["greeting"] | nowhere
        return torch.where(general[..., None] | (chunks < 0), -1, chunks // CHUNK_TICKS)


def _first_form(question_type: str) -> str:
    return next(form for form, name in FORMS.items() if name == question_type)


def _pick_code(codes: Tensor, place: Tensor) -> Tensor:
    """[V, R, 3] of ``codes`` [V, R, 2, 3]."""
    return codes.gather(2, place[..., None, None].expand(-1, -1, 1, codes.shape[3]))[:, :, 0]


def _dialogue(ids: Tensor, answer: Tensor, past: Tensor, before: Tensor, num_before: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [V, R, MAX_ROW] with the first ``num_before`` [V, R] of the turns ``before`` [V, R, MAX_PAST] in front.

    ``before`` indexes ``past`` [V, R, MAX_TURN]; the turns that leave no room are dropped, furthest first.
    """
    videos, rows, size = ids.shape
    pad = _id(tokenizer.PAD)
    turns = past.gather(1, before.flatten(1)[..., None].expand(-1, -1, size)).view(videos, rows, MAX_PAST, size)
    room = MAX_ROW - (ids != pad).sum(-1)
    fits = (turns != pad).sum(-1).cumsum(-1) <= room[..., None]
    fits &= torch.arange(MAX_PAST, device=ids.device) < num_before[..., None]
    turns = torch.where(fits[..., None], turns, pad).flip(2)
    wide = torch.cat([turns.flatten(2), ids], 2)
    learn = torch.cat([torch.zeros_like(turns.flatten(2), dtype=torch.bool), answer], 2)
    order = (wide == pad).long().argsort(stable=True, dim=2)[..., :MAX_ROW]
    return wide.gather(2, order), learn.gather(2, order)


def _row(form: str, rng: Random) -> tuple[list[int], list[bool], list[int]]:
    """One phrasing, MAX_TURN long: ids (blanks are ``-1 - column``), answer mask, and ids as an earlier turn.

    An earlier answer comes back through the client, so there it is encoded as users' text is.
    """
    while True:
        asked = form if form != "blind" else rng.choice([name for name in FORMS if name != "greeting"])
        prompt = [*_encode(roughen(sentence(asked, rng), rng)), _id(tokenizer.ASSISTANT)]
        text = ANSWERS.get(form, NO_VIDEO)
        answer = [*_encode(text, answer=True), _id(tokenizer.END)]
        turn = [*prompt, *_encode(text), _id(tokenizer.END), _id(tokenizer.USER)]
        padding, rest = MAX_TURN - len(prompt) - len(answer), MAX_TURN - len(turn)
        if min(padding, rest) >= 0:
            pad = _id(tokenizer.PAD)
            mask = [False] * len(prompt) + [True] * len(answer) + [False] * padding
            return prompt + answer + [pad] * padding, mask, turn + [pad] * rest


def _id(token: str) -> int:
    index = tokenizer.load().token_to_id(token)
    assert index is not None, token
    return index


def _encode(text: str, answer: bool = False) -> list[int]:
    """Ids of a text with blanks."""
    vocabulary = tokenizer.load()
    blank, colon = _id(tokenizer.BLANK), _id("<0x3A>")
    ids: list[int] = []
    for index, piece in enumerate(re.split(r"\{(\w+)\}", text)):
        if index % 2 == 0:
            literal = (
                tokenizer.encode_answer(piece) if answer else vocabulary.encode(piece, add_special_tokens=False).ids
            )
            # The blank before a blank's value is written below; a trailing one of the literal would double it.
            ids += literal[:-1] if literal[-1:] == [blank] else literal
            continue
        name = piece if answer else piece.replace("code", "spoken").replace("yes", "said")
        if name in SLOTS:
            ids.append(-1 - SLOTS[name])
            continue
        kind, number = name[:-1], name[-1]
        if kind in ("obj", "scene") or name == "first":
            ids += [-1 - SLOTS[f"{name}_{part}"] for part in range(2)]
        elif kind in ("code", "spoken"):
            ids += [blank, *(-1 - SLOTS[f"{name}_{part}"] for part in range(3))]
        else:
            digits = [-1 - SLOTS[f"{'time' if kind == 'short' else kind}{number}_{part}"] for part in range(4)]
            minutes = digits[1:2] if kind == "short" else digits[:2]
            ids += [blank, *minutes, colon, *digits[2:]]
    return ids[1:] if answer and ids[:1] == [blank] else ids
