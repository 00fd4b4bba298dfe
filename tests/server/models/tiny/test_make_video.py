from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from server.models.tiny.exam import EXAM
from server.models.tiny.font import GLYPHS
from server.models.tiny.make_video import FRAME_RATES, SIZES, VideoPlan, exam_entry, make_video, plan_video
from server.models.tiny.render import plate_corner
from server.models.tiny.world import CHUNK_TICKS, PLATE_COLORS, SYMBOLS, object_name

SEEDS = (0, 5)
CHUNKS = 2


class Made:
    def __init__(self, folder: Path, seed: int) -> None:
        self.plan = plan_video(seed, CHUNKS)
        self.path = folder / f"{seed}.mp4"
        self.exam = make_video(self.path, seed, CHUNKS)
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            self.codec, self.size, self.rate = (
                stream.codec_context.name,
                (stream.width, stream.height),
                stream.average_rate,
            )
            self.duration_s = float(stream.duration * stream.time_base)
            frames = list(container.decode(stream))
        self.times_s = [frame.time for frame in frames]
        self.keys = [index for index, frame in enumerate(frames) if frame.key_frame]
        self.pictures = [frame.to_ndarray(format="rgb24") for frame in frames]


@pytest.fixture(scope="module", params=SEEDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("videos"), request.param)


def test_the_file_is_what_its_plan_says(made: Made) -> None:
    plan = made.plan
    assert made.codec == "h264"
    assert made.size == (plan.width, plan.height) and made.size in SIZES
    assert made.rate == plan.frame_rate and plan.frame_rate in FRAME_RATES
    assert made.duration_s == CHUNK_TICKS * CHUNKS and len(made.pictures) == CHUNK_TICKS * CHUNKS * plan.frame_rate
    assert np.allclose(made.times_s, np.arange(len(made.pictures)) / plan.frame_rate, atol=1e-3)
    assert np.diff(made.keys).tolist() == [plan.gop_s * plan.frame_rate] * (len(made.keys) - 1)
    assert sorted(path.name for path in made.path.parent.iterdir()) == [
        made.path.with_suffix(".json").name,
        made.path.name,
    ]


def test_there_is_motion_inside_a_tick(made: Made) -> None:
    changes = [np.abs(one.astype(int) - two).max() for one, two in pairwise(made.pictures)]
    assert np.mean([change > 20 for change in changes]) > 0.6


def read_plate(picture: np.ndarray, plan: VideoPlan, tick: int, place: int) -> tuple[int, str]:
    """Plate colour and code as they stand in a decoded picture, by position and bit pattern alone."""
    left, top = (float(value[0]) for value in plate_corner(plan.script.looks[0, tick : tick + 1], place))

    def at(x: float, y: float) -> np.ndarray:
        return picture[int(y * plan.height / 64), int(x * plan.width / 96)].astype(float)

    ground = np.mean([at(left + 1, top + 2 + step) for step in range(12)], 0)
    palette = np.array(list(PLATE_COLORS.values()))[:, None] * np.linspace(0.85, 1, 5)[:, None]
    color = int(np.abs(palette - ground).sum(-1).min(1).argmin())
    ink = np.array([242.0] * 3 if ground @ [0.3, 0.59, 0.11] < 128 else [13.0] * 3)
    code = ""
    for symbol in range(3):
        cells = [[at(left + 3 + 12 * symbol + 2 * c, top + 2 + 2 * r) for c in range(5)] for r in range(7)]
        bits = np.array([[np.abs(cell - ink).sum() < np.abs(cell - ground).sum() for cell in row] for row in cells])
        code += SYMBOLS[int((GLYPHS.numpy() != bits).sum((1, 2)).argmin())]
    return color, code


def test_the_frame_at_every_second_shows_that_ticks_state(made: Made) -> None:
    script = made.plan.script
    for tick in range(script.num_ticks):
        for place in (0, 1):
            color, code = read_plate(made.pictures[tick * made.plan.frame_rate], made.plan, tick, place)
            assert color == script.plates[0, tick, place]
            assert code == "".join(SYMBOLS[symbol] for symbol in script.codes[0, tick, place].tolist())


def test_states_change_between_the_seconds_not_at_them(made: Made) -> None:
    script, rate = made.plan.script, made.plan.frame_rate
    moving = [tick for tick in range(1, script.num_ticks) if not script.static[0, tick]]
    for tick in moving:
        border = next(i for i in range(len(made.pictures)) if i / rate + made.plan.phase_s >= tick)
        assert (tick - 1) * rate < border <= tick * rate
        shown = [
            read_plate(made.pictures[index], made.plan, at, 0)[1]
            for index, at in ((border, tick), (border - 1, tick - 1))
        ]
        wanted = ["".join(SYMBOLS[s] for s in script.codes[0, at, 0].tolist()) for at in (tick, tick - 1)]
        assert shown == wanted


def test_the_json_beside_it_is_the_documented_format(made: Made) -> None:
    assert json.loads(made.path.with_suffix(".json").read_text()) == made.exam
    assert list(made.exam) == ["seed", "chunks", "duration_s", "questions"]
    assert made.exam["duration_s"] == CHUNK_TICKS * CHUNKS
    for question in made.exam["questions"]:
        assert list(question) == ["question", "answer", "type", "chunks", "start_s", "end_s"]


def seconds(text: str) -> int:
    minutes, rest = text.split(":")
    return 60 * int(minutes) + int(rest)


def check(plan: VideoPlan, entry: dict[str, Any]) -> None:
    """Derive the answer from the script alone, by reading the question's words."""
    script, question, answer = plan.script, entry["question"], entry["answer"]
    shown = [object_name(index) for index in script.objects[0].tolist()]
    starts = sorted(set(script.starts[0].tolist()))
    colors = "|".join(PLATE_COLORS)

    def plates(words: str) -> list[tuple[str, int]]:
        place, color, name = re.fullmatch(rf"(?:(upper|lower) )?(?:({colors}) )?label of the (\w+ \w+)", words).groups()  # type: ignore[union-attr]
        return [
            ("".join(SYMBOLS[s] for s in script.codes[0, tick, p].tolist()), tick)
            for tick in range(len(shown))
            for p in (0, 1)
            if shown[tick] == name
            and place in (None, ("upper", "lower")[p])
            and color in (None, list(PLATE_COLORS)[int(script.plates[0, tick, p])])
        ]

    named = re.findall(rf"(?:(?:upper|lower) )?(?:(?:{colors}) )?label of the \w+ \w+?\b", question)
    if entry["type"] in ("code", "multi"):
        found = [plates(words) for words in named]
        assert [{code for code, _ in fit} for fit in found] == [{code} for code in answer.split(" and ")]
        ticks = [tick for fit in found for _, tick in fit]
    elif entry["type"] == "object":
        ticks = [seconds(re.search(r"\d\d:\d\d", question)[0])]  # type: ignore[index]
        assert answer == shown[ticks[0]]
    else:
        objects = re.findall(
            r"(?:the|an?) ((?:\w+) (?:circle|square|triangle|star|ring|cross|diamond|heart|moon|arrow))", question
        )
        ticks = [tick for tick, name in enumerate(shown) if name in objects]
        if entry["type"] == "exist":
            assert answer == ("Yes" if ticks else "No")
        elif entry["type"] == "time":
            assert seconds(answer) == ticks[0]
        elif entry["type"] == "count":
            assert answer == str(sum(shown[start] in objects for start in starts))
        else:
            assert answer == min(objects, key=shown.index) and len(objects) == 2
    assert entry["chunks"] == sorted({tick // CHUNK_TICKS for tick in ticks})
    if not ticks:
        assert entry["start_s"] is None and entry["end_s"] is None
        return
    assert entry["start_s"] == min(ticks)
    assert max(ticks) < entry["end_s"] < max(ticks) + 1
    assert entry["end_s"] <= plan.duration_s


@pytest.mark.parametrize("chunks", [1, 2, 16, 40])
def test_answers_are_right_when_derived_again_from_the_script(chunks: int) -> None:
    for seed in range(40):
        plan = plan_video(seed, chunks)
        entries = [exam_entry(question, plan.phase_s) for question in plan.questions]
        assert len({entry["question"] for entry in entries}) == len(entries) >= 12
        assert sum(entry["type"] == "code" for entry in entries) >= 4
        if chunks >= 16:
            assert [entry["type"] for entry in entries] == list(EXAM)
            assert sorted(entry["answer"] for entry in entries if entry["type"] == "exist") == ["No", "Yes"]
            assert all(int(entry["answer"]) >= 2 for entry in entries if entry["type"] == "count")
            multi = next(entry for entry in entries if entry["type"] == "multi")
            assert len(multi["chunks"]) == 2 and multi["chunks"][1] - multi["chunks"][0] >= 2
        for entry in entries:
            check(plan, entry)


def test_all_choices_occur_and_a_seed_repeats() -> None:
    plans = [plan_video(seed, 1) for seed in range(80)]
    assert {(plan.width, plan.height) for plan in plans} == set(SIZES)
    assert {plan.frame_rate for plan in plans} == set(FRAME_RATES)
    assert min(plan.crf for plan in plans) == 18 and max(plan.crf for plan in plans) == 32
    assert {plan.gop_s for plan in plans} == set(range(2, 11))
    assert all(0.1 < plan.phase_s < 0.9 for plan in plans)
    assert plan_video(7, 4).questions == plan_video(7, 4).questions
    assert plan_video(7, 4).questions != plan_video(8, 4).questions


@pytest.mark.parametrize(("seed", "chunks"), [(-1, 2), (1_000_000, 2), (0, 0), (0, 376)])
def test_seeds_and_lengths_out_of_range_are_refused(tmp_path: Path, seed: int, chunks: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        make_video(tmp_path / "a.mp4", seed, chunks)
    assert not list(tmp_path.iterdir())


def test_a_bad_path_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.mp4"):
        make_video(tmp_path / "a.avi", 0, 1)
    with pytest.raises(OSError):
        make_video(tmp_path / "no" / "a.mp4", 0, 1)
    assert not list(tmp_path.iterdir())
