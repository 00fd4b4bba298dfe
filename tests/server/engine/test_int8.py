"""L-KVs as int8: half the bytes, never mixed with exact ones, and H-KVs untouched."""

from __future__ import annotations

from collections.abc import Callable

from clips import Clip

from compression.select import Dial
from kvstore.memory import MemoryStore
from kvstore.video import VideoStore

EVERYTHING = Dial(mode="low")


def test_the_same_video_in_both_precisions(drive: Callable, four_chunks: Clip) -> None:
    store = MemoryStore()
    exact = drive(store)
    file = exact.upload(four_chunks)
    exact.wait_whole(file)
    exact_video, exact_answer = exact.engine.library.video(file.id, ""), exact.ask(file)
    low_text = exact.ask(file, dial=EVERYTHING).text
    exact.engine.close()

    int8 = drive(store, low_precision="int8")
    again = int8.upload(four_chunks)
    int8.wait_whole(again)
    int8_video, answer = int8.engine.library.video(again.id, ""), int8.ask(again)
    assert int8_video.key != exact_video.key
    assert int8.num_prefilled == 4, "what was stored exactly is not what int8 would give"
    assert again.video.nbytes_low < 0.55 * file.video.nbytes_low  # scales weigh much beside a few tokens
    assert again.video.nbytes_high == file.video.nbytes_high
    assert answer.outcome.scores == exact_answer.outcome.scores, "scores come from H-KVs, which stay exact"
    assert not answer.outcome.degraded

    videos = VideoStore(store)
    for one, other in zip(
        videos.read_low(exact_video.key, range(4)), videos.read_low(int8_video.key, range(4)), strict=True
    ):
        # Half a 127th of a channel's largest magnitude, of all of them the largest.
        assert 0 < (one.keys - other.keys).abs().max() <= one.keys.abs().max() * 0.501 / 127
    int8.engine.close()

    back = drive(store)
    assert back.ask(file, dial=EVERYTHING).text == low_text
    assert back.num_prefilled == 0
