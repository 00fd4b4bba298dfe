from __future__ import annotations

import re
from random import Random

import pytest
import torch

from server.models.tiny import grammar, language, phrases, tokenizer, world
from server.models.tiny.questions import FINAL_MIX, MAX_ROW, TYPES, QuestionBank, Questions
from server.models.tiny.world import CHUNK_TICKS, COLORS, PLATE_COLORS, SHAPES, SYMBOLS, object_name

OBJECT = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
PLATE = re.compile(rf"\b({'|'.join(PLATE_COLORS)})\b")
TIME = re.compile(r"\b(\d{1,2}):(\d\d)\b")


@pytest.fixture(scope="module")
def bank() -> QuestionBank:
    return QuestionBank(150, seed=1)


def rows(bank: QuestionBank, chunks: int, **options: object) -> list[tuple[int, str, str, str, list[int], bool]]:
    """(video, type, question, answer, chunks, blind) of every row, the question without the turns before it."""
    generator = world.training_generator(1_000_003)
    script = world.sample_scripts(3, chunks, generator, durations={4: 0.5, 8: 0.5}, p_static=0.3)
    sampled = bank.sample(script, 300, generator, **options)  # type: ignore[arg-type]
    pad = tokenizer.load().token_to_id(tokenizer.PAD)
    found = []
    for video in range(3):
        for row in range(300):
            ids, learned = sampled.ids[video, row], sampled.answer[video, row]
            assert ids.min() >= 0 and ids.shape == (MAX_ROW,) and (ids[int(learned.nonzero().max()) + 1 :] == pad).all()
            text = tokenizer.load().decode(ids[: int(learned.nonzero().max()) + 1].tolist(), skip_special_tokens=False)
            *_, (question, answer) = [turn.split("<assistant>") for turn in text.removesuffix("<end>").split("<user>")]
            where = [chunk for chunk in sampled.chunks[video, row].tolist() if chunk >= 0]
            name = TYPES[int(sampled.types[video, row])]
            found.append((video, name, question.strip(), answer.strip(), where, bool(sampled.blind[video, row])))
    rows.script = script  # type: ignore[attr-defined]
    return found


def first_tick(script: world.Script, video: int, name: str) -> int:
    return [object_name(index) for index in script.objects[video].tolist()].index(name)


def codes_that_fit(script: world.Script, video: int, question: str) -> tuple[set[str], set[int]]:
    """Codes, and their chunks, of all plates that the question's words describe."""
    name = " ".join(OBJECT.search(question).groups())  # type: ignore[union-attr]
    label = PLATE.search(OBJECT.sub("", question))
    lower = re.search(r"\b(lower|bottom|below|under|lowermost|bottommost)\b", question)
    fit: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    for tick, index in enumerate(script.objects[video].tolist()):
        for place in (0, 1):
            color = list(PLATE_COLORS)[int(script.plates[video, tick, place])]
            if object_name(index) == name and (label is None or label[1] == color):
                code = "".join(SYMBOLS[symbol] for symbol in script.codes[video, tick, place].tolist())
                fit[place].append((code, tick // CHUNK_TICKS))
    chosen = fit[1] if lower else fit[0] if re.search(r"\b(up|top|higher|above|over)", question) else fit[0] + fit[1]
    chosen = chosen or fit[0] + fit[1]  # "over the video" is no place
    return {code for code, _ in chosen}, {chunk for _, chunk in chosen}


@pytest.mark.parametrize("chunks", [1, 16])
def test_answers_are_true_and_unique(bank: QuestionBank, chunks: int) -> None:
    seen = set()
    found = rows(bank, chunks, p_dialogue=0.3)
    script: world.Script = rows.script  # type: ignore[attr-defined]
    for video, name, question, answer, where, _ in found:
        objects = [" ".join(pair) for pair in OBJECT.findall(question)]
        shown = [object_name(index) for index in script.objects[video].tolist()]
        seen.add(name)
        if name == "code":
            codes, held = codes_that_fit(script, video, question)
            assert codes == {answer}, question
            assert where == sorted(held)
        elif name == "exist":
            assert answer == ("Yes" if objects[0] in shown else "No")
            assert bool(where) == (answer == "Yes")
        elif name == "order":
            one, two = (first_tick(script, video, wanted) for wanted in objects)
            first = objects[0] if one < two else objects[1]
            assert answer == f"{language.clock(one)} and {language.clock(two)}, so the {first}"
            assert where == [one // CHUNK_TICKS, two // CHUNK_TICKS]
        elif name == "count":
            starts = sorted(set(script.starts[video].tolist()))
            held_at = [start for start in starts if shown[start] == objects[0]]
            assert answer == str(len(held_at))
            assert where == [start // CHUNK_TICKS for start in held_at]
        elif name == "time":
            assert answer == language.clock(first_tick(script, video, objects[0]))
        elif name == "object":
            minutes, seconds = map(int, TIME.search(question).groups())  # type: ignore[union-attr]
            assert answer == shown[60 * minutes + seconds]
            assert where == [(60 * minutes + seconds) // CHUNK_TICKS]
        elif name == "multi":
            for wanted, code in zip(objects, answer.split(" and "), strict=True):
                assert code in codes_that_fit(script, video, wanted)[0]
        elif name == "refuse":
            assert answer == language.CANNOT_TELL or answer == f"There is no {objects[0]} in the video."
            assert answer == language.CANNOT_TELL or objects[0] not in shown
    assert seen >= ({*FINAL_MIX} - {"greeting", "describe"} if chunks == 16 else {"code", "exist", "time", "object"})


def test_blind_rows_always_say_that_there_is_no_video(bank: QuestionBank) -> None:
    asked = torch.zeros(3, 300, dtype=torch.bool)
    asked[:, ::2] = True
    found = rows(bank, 4, blind=asked)
    assert {answer for _, name, _, answer, _, blind in found if blind and name != "greeting"} == {language.NO_VIDEO}
    assert language.NO_VIDEO not in {answer for *_, answer, _, blind in found if not blind}


def test_a_dialogue_is_whole_turns_about_the_same_video(bank: QuestionBank) -> None:
    script = world.sample_scripts(2, 16, world.training_generator(1_000_004))
    generator = world.training_generator(1_000_005)
    plain = bank.sample(script, 200, generator.clone_state())
    talks = bank.sample(script, 200, generator, p_dialogue=1.0)

    def texts(sampled: Questions, video: int) -> list[str]:
        rows = [ids[ids != tokenizer.load().token_to_id(tokenizer.PAD)] for ids in sampled.ids[video]]
        return [tokenizer.load().decode(row.tolist(), skip_special_tokens=False) for row in rows]

    lengths = set()
    for video in range(2):
        alone = texts(plain, video)
        spoken = {re.sub(r"[^a-z0-9:<>]", "", text.lower()) for text in alone}
        for question, text in zip(alone, texts(talks, video), strict=True):
            *before, last = text.split("<user>")
            assert last.strip() == question.strip()
            assert all(re.sub(r"[^a-z0-9:<>]", "", turn) in spoken for turn in before), before
            lengths.add(len(before))
    assert lengths == {1, 2, 3}


def test_a_video_cut_from_a_longer_one_keeps_its_clock(bank: QuestionBank) -> None:
    script = world.sample_scripts(20, 2, world.training_generator(1_000_006), p_late=1.0)
    assert int(script.clock.max()) > 3000 and int(script.clock.max()) + script.num_ticks <= world.MAX_CLOCK_S
    asked = bank.sample(script, 8, world.training_generator(1_000_007), {"time": 1.0})
    for video in range(20):
        for row in range(8):
            answer = tokenizer.load().decode(asked.ids[video, row][asked.answer[video, row]].tolist())
            assert answer == language.clock(int(script.clock[video] + script.starts[video, asked.ticks[video, row, 0]]))


def test_the_mix_is_respected_and_draws_repeat(bank: QuestionBank) -> None:
    script = world.sample_scripts(2, 4, torch.Generator().manual_seed(1))
    one = bank.sample(script, 50, torch.Generator().manual_seed(2), {"time": 1.0})
    two = bank.sample(script, 50, torch.Generator().manual_seed(2), {"time": 1.0})
    assert set(one.types.flatten().tolist()) == {TYPES.index("time")}
    assert torch.equal(one.ids, two.ids)


@pytest.mark.parametrize("form", [form for form in language.FORMS if form not in ("greeting",)])
def test_there_are_hundreds_of_paraphrases_with_the_forms_blanks(form: str) -> None:
    rng = Random(5)
    texts = {phrases.sentence(form, rng) for _ in range(1200)}
    assert len(texts) > 350
    known = {name for kind in language.PLAIN.values() for text in kind for name in re.findall(r"\{(\w+)\}", text)}
    for text in texts:
        assert not set("()|$") & set(text), text
        blanks = set(re.findall(r"\{(\w+)\}", text))
        assert blanks <= known | {"a2", "code1", "short1", *(f"p{i}_{w}" for i in (1, 2) for w in language.POSITIONS)}
        if form in ("code_full", "absent", "exist", "time", "count"):
            assert "obj1" in blanks
        if form == "code_full":
            assert "lab1" in blanks and any(blank.startswith("p1_") for blank in blanks), text
        if form in ("order", "multi_full", "multi_place"):
            assert {"obj1", "obj2"} <= blanks
            # The answer names the objects in the order of the question.
            assert text.index("{obj1}") < text.index("{obj2}")


@pytest.mark.parametrize("name", ["CODE", "EXIST", "ORDER", "COUNT", "TIME", "OBJECT", "MULTI"])
def test_every_type_has_many_base_templates(name: str) -> None:
    assert len(set(getattr(grammar, name))) >= 60
