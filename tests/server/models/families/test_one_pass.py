"""Every family of transformers' own classes, tiny and random, through this server's pass, caches and positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_transformers import (
    CLIPS,
    FRAME_TOKENS,
    NUM_NEW,
    PICTURES,
    PREPROCESSING,
    QUESTIONS,
    SAVE,
    VIDEOS,
    ask,
    edit_json,
    image,
    noise,
    prefill,
    prompt,
)
from transformers import PreTrainedModel

from compression.compressor import join
from compression.kv import ChunkKV
from compression.methods import COMPRESSORS
from compression.mixed import MixedCache
from kvstore import codec
from server.models.base import PositionLimitError, Turn
from server.models.families.one_pass import OnePassConfig, OnePassModel, OnePassPrefill
from server.models.memory import CHEAPER, room_to_ask
from server.models.registry import load_model
from server.video.frames import Frames

FRAMES = VIDEOS[0]


@dataclass
class Family:
    name: str
    folder: Path
    model: PreTrainedModel

    def load(self, **options: Any) -> OnePassModel:
        """With its own sizes of frames, but fewer tokens."""
        given = OnePassConfig(**{"low_ratio": 1, "high_ratio": 1, **options})
        own = {} if self.name == "llava_onevision" else {"frame_tokens": FRAME_TOKENS}
        module = import_module(f"server.models.families.{self.name}")
        place = {"device": torch.device("cpu"), "dtype": torch.float32, "hints": module.HINTS()}
        model: OnePassModel = module.load(self.folder, "tiny", **place, compression=given, **own)
        return model

    def serve(self) -> OnePassModel:
        """As users get it, and as the folder says."""
        model = load_model(str(self.folder), device="cpu", low_ratio=1, high_ratio=1)
        assert isinstance(model, OnePassModel)
        return model


@pytest.fixture(scope="module", params=SAVE)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    model = SAVE[request.param](folder)
    hints: dict[str, Any] = {} if request.param == "llava_onevision" else {"frame_size": [40, 24]}
    if request.param == "qwen2_5_vl":
        hints["text_behind"] = "frame"  # the rule of the installed transformers, and so of its generate
    edit_json(folder / "config.json", x2l=hints)
    return Family(request.param, folder, model)


@pytest.mark.parametrize(("frames", "sizes"), [(VIDEOS[0], [8, 8, 4]), (VIDEOS[1], [4, 5])])
@pytest.mark.parametrize("question", QUESTIONS)
def test_at_ratio_1_it_says_what_the_model_itself_says(
    family: Family, frames: Frames, sizes: list[int], question: str
) -> None:
    model = family.serve()
    given = prompt(model, frames, question)
    with torch.inference_mode():
        expected = family.model(**given).logits[0]
        whole = family.model.generate(**given, max_new_tokens=NUM_NEW, do_sample=False)
    logits, answer = ask(model, prefill(model, frames, sizes), question, NUM_NEW)
    torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=0)
    assert answer == whole[0, given["input_ids"].shape[1] :].tolist()
    assert len(set(answer)) > 3, "an answer that tells something"


@pytest.mark.parametrize(
    ("sizes", "with_video"),
    [([(100, 60)], True), ([(61, 45)], False), ([(40, 90), (200, 150)], True), ([(150, 210)], False)],
)
def test_images_are_seen_as_the_model_itself_sees_them(
    family: Family, sizes: list[tuple[int, int]], with_video: bool
) -> None:
    """Behind a video or without one, alone or two of them; nothing of them is compressed."""
    model, frames = family.serve(), FRAMES if with_video else None
    shown = [model.preprocess_image(image(seed, *size), alone=len(sizes) == 1) for seed, size in enumerate(sizes)]
    given = prompt(model, frames, QUESTIONS[0], shown)
    with torch.inference_mode():
        expected = family.model(**given).logits[0]
        whole = family.model.generate(**given, max_new_tokens=NUM_NEW, do_sample=False)
    pairs = prefill(model, FRAMES, [8, 12]) if with_video else []
    logits, answer = ask(model, pairs, QUESTIONS[0], NUM_NEW, shown)
    torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=0)
    assert answer == whole[0, given["input_ids"].shape[1] :].tolist()
    others, _ = ask(model, pairs, QUESTIONS[0], 0)
    assert not torch.allclose(logits[-1], others[-1], atol=1e-2), "it did look"


def test_the_prompt_with_a_video_and_an_image_is_the_processors(family: Family) -> None:
    """Token for token, timestamps included: what ``generate`` is given above is what it would be given."""
    model, (width, height, num_frames) = family.load(), CLIPS[0]
    shown = model.preprocess_image(image(0, *PICTURES[0]), alone=True)
    ids = prompt(model, noise(num_frames, width, height, interval_s=0.5), "", [shown])["input_ids"][0].tolist()
    with np.load(PREPROCESSING) as arrays:
        expected = arrays[f"{family.name}/ids"].tolist()
    before, behind = list(model.prompt.prefix_ids), model.tokenize([Turn("user", "")])
    assert ids == [*before, *expected, *behind]


@pytest.mark.parametrize("sizes", [[8, 6, 6], [2] * 10])
def test_the_number_of_chunks_changes_nothing(family: Family, sizes: list[int]) -> None:
    model = family.load()
    once, in_chunks = prefill(model, FRAMES, [20]), prefill(model, FRAMES, sizes)
    for question in QUESTIONS:
        logits, answer = ask(model, once, question, NUM_NEW)
        others, same = ask(model, in_chunks, question, NUM_NEW)
        torch.testing.assert_close(others, logits, atol=1e-4, rtol=0)
        assert same == answer


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_both_levels_keep_what_they_keep_as_it_is(family: Family, compressor: str) -> None:
    whole, model = family.load(), family.load(low_ratio=2, high_ratio=7, compressor=compressor)
    (raw, _), (end_raw, _) = prefill(whole, FRAMES, [8, 12])
    (low, high), (end_low, end_high) = prefill(model, FRAMES, [8, 12])
    visual = [model.num_visual_tokens(size, 100, 60) for size in (8, 12)]
    others = raw.num_tokens - visual[0]  # kept whole at both levels
    assert others == {"qwen2_5_vl": len("S"), "qwen3_vl": 4 * len("<1.5 seconds>SE"), "llava_onevision": 0}[family.name]
    assert [low.num_tokens, high.num_tokens] == [others + -(-visual[0] // ratio) for ratio in (2, 7)]
    assert (low.level, high.level, low.ratio, high.ratio) == ("low", "high", 2, 7)
    assert low.next_position == high.next_position == raw.next_position
    end_others = end_raw.num_tokens - visual[1]
    assert end_others > 0
    assert end_low.num_tokens - end_others == -(-visual[1] // 2)
    assert end_high.num_tokens - end_others == -(-visual[1] // 7)
    if compressor == "pool":
        return  # its tokens are means
    for kv in (low, high):
        for layer, head in ((0, 0), (2, 1)):
            # By its value: in a random model no two tokens share one.
            matches = (kv.values[layer, head][:, None] == raw.values[layer, head]).all(-1)
            assert (matches.sum(-1) >= 1).all()
            at = matches.int().argmax(-1)
            assert torch.equal(kv.keys[layer, head], raw.keys[layer, head, at])
            if kv.positions is not None and layer:  # in layer 0 a text token is the same wherever it stands
                places = kv.positions.expand(3, *kv.keys.shape[:3])[:, layer, head]
                assert torch.equal(places, raw.positions[:, 0, 0, at])


@pytest.mark.parametrize("sizes", [[8, 12], [20]])
def test_raw_chunks_with_all_that_is_not_visual_are_what_ratio_1_keeps(family: Family, sizes: list[int]) -> None:
    model = family.load()
    kept, run, start = prefill(model, FRAMES, sizes), model.prefill(), 0
    assert isinstance(run, OnePassPrefill)
    raw = []
    for size, (low, _) in zip(sizes, kept, strict=True):
        part = Frames(FRAMES.pixels[start : start + size], FRAMES.times_s[start : start + size])
        start += size
        tokens = model.encode(model.preprocess(part), part.times_s)
        chunk = run.append_raw(tokens, last=start == 20)
        assert chunk.num_tokens == model.num_visual_tokens(size, 100, 60)
        assert same(chunk.with_others(chunk.kv), low)
        raw.append(chunk)
    whole = join(raw)
    assert whole.num_others == sum(chunk.num_others for chunk in raw)
    end, (last, _) = whole.with_others(whole.kv), kept[-1]
    assert (end.num_tokens, end.next_position) == (sum(low.num_tokens for low, _ in kept), last.next_position)
    once, apart = (ask(model, pairs, QUESTIONS[0], 0)[0] for pairs in ([(end, end)], kept))
    if end.positions is None:  # others of an earlier chunk would stand elsewhere: there are none
        assert all(chunk.others is None for chunk in raw[:-1])
    torch.testing.assert_close(once, apart, atol=1e-4, rtol=0)


def same(a: ChunkKV, b: ChunkKV) -> bool:
    assert (a.level, a.ratio, a.next_position, a.num_others) == (b.level, b.ratio, b.next_position, b.num_others)
    assert (a.positions is None) == (b.positions is None)
    pairs = [(a.keys, b.keys), (a.values, b.values), (a.positions, b.positions)]
    return all(x is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("compressor", ["stride", "keydiff"])
def test_the_store_gives_back_what_it_was_given(family: Family, compressor: str) -> None:
    model = family.load(low_ratio=2, high_ratio=7, compressor=compressor)
    for kv in [kv for pair in prefill(model, FRAMES, [8, 12]) for kv in pair]:
        data = codec.encode(kv)
        assert same(codec.decode(data), kv)
        assert 0 < len(data) - codec.stored_nbytes(kv) < 1000
        small = codec.encode(kv, "int8")
        decoded = codec.decode(small)
        assert 0 < len(small) - codec.stored_nbytes(kv, "int8") < 1000
        assert decoded.next_position == kv.next_position
        if kv.positions is not None:
            assert torch.equal(decoded.positions, kv.positions)


def test_all_selected_is_the_low_cache_and_none_is_the_high_cache(family: Family) -> None:
    model = family.load(low_ratio=2, high_ratio=7, compressor="keydiff")
    pairs = prefill(model, FRAMES, [8, 6, 6])
    for level in (0, 1):
        chunks = [pair[level] for pair in pairs]
        cache = MixedCache(model.prefix(), chunks, model.rope, room=8)
        assert cache.num_mixed == len(model.prompt.prefix_ids) + sum(kv.num_tokens for kv in chunks)
        end = pairs[-1][0].next_position
        assert cache.next_position == (cache.num_mixed if end is None else end)
        for (start, visual_stop), kv in zip(cache.spans, chunks, strict=True):
            stop = start + kv.num_tokens
            assert visual_stop == stop - kv.num_others
            positions = torch.arange(start, stop) if kv.positions is None else kv.positions
            rotated = model.rope.rotate(kv.keys, *model.rope.tables(positions, torch.float32))
            assert torch.equal(cache.keys[:, :, start:stop], rotated)
            assert torch.equal(cache.values[:, :, start:stop], kv.values)


@pytest.mark.parametrize(("mode", "num_low"), [("exact", 9), ("recent-1", 1), ("high-memory", 0), ("bounded-1", None)])
def test_the_prefill_mode_is_what_a_pass_sees_and_restoring_goes_on_alike(
    family: Family, mode: str, num_low: int | None
) -> None:
    model = family.load(low_ratio=2, high_ratio=6, prefill_mode=mode)
    pairs = prefill(model, FRAMES, [6, 6, 8])
    part = Frames(FRAMES.pixels[12:], FRAMES.times_s[12:])
    tokens = model.encode(model.preprocess(part), part.times_s)
    by_hand, resumed = family.load(low_ratio=2, high_ratio=6).prefill(), model.prefill()
    for index, (low, high) in enumerate(pairs[:2]):
        if num_low is not None or index == 1:
            seen = low if num_low and index >= 2 - num_low else high
            by_hand.restore(0, seen, seen)
        resumed.restore(0, low, high)
    for kv, expected in zip(resumed.append(tokens, last=True), pairs[2], strict=True):
        assert same(kv, expected)
    for kv, expected in zip(by_hand.append(tokens, last=True), pairs[2], strict=True):
        torch.testing.assert_close(kv.keys, expected.keys, atol=1e-5, rtol=0)


def test_the_longest_video_of_every_mode_fits_and_a_longer_one_does_not(family: Family) -> None:
    model = family.load(low_ratio=2, high_ratio=6)
    model.spec = replace(model.spec, frames_per_chunk=4, max_positions=150)
    modes = model.prefill_modes(100, 60, 1.0)
    assert [mode for mode, _ in modes] == ["exact", *CHEAPER]
    # Only where positions are contiguous does a mode save any.
    assert len({most for _, most in modes}) == (len(modes) if family.name == "llava_onevision" else 1)
    for mode, most in modes:
        for num_frames, fits in ((most, True), (most + 8, False)):
            assert fits_prefill_and_question(model, mode, noise(num_frames, 100, 60)) == fits


def fits_prefill_and_question(model: OnePassModel, mode: str, frames: Frames) -> bool:
    run, high = model.prefill(mode), []
    try:
        for start in range(0, len(frames), 4):
            part = Frames(frames.pixels[start : start + 4], frames.times_s[start : start + 4])
            tokens = model.encode(model.preprocess(part), part.times_s)
            high.append(run.append(tokens, last=start + 4 >= len(frames))[1])
    except PositionLimitError:
        return False
    cache = MixedCache(model.prefix(), high, model.rope, room=0)
    ends = [cache.next_position, *(int(kv.positions.max()) + 1 for kv in high if kv.positions is not None)]
    return max(ends) + room_to_ask(model.spec.max_positions) <= model.spec.max_positions
