"""The arithmetic of the rows and of the table, on made-up measurements."""

from __future__ import annotations

import pytest

from server.bench.serving.asker import Answer
from server.bench.serving.decode import Window, pick, summarize
from server.bench.serving.floor import Floor
from server.bench.serving.follow_up import summarize as summarize_follow_up
from server.bench.serving.hardware import Paces
from server.bench.serving.resident import full_cache
from server.bench.serving.run import Sizes, reachable
from server.bench.serving.table import format_table, make_table
from server.bench.serving.video import UploadedVideo

FLOOR = Floor(Paces(copy=1e6, to_device=1e6, matmul=1e9), weight_nbytes=1000, token_nbytes=10)


def answer(ttft_s: float, reload_ms: float, reload_nbytes: int) -> Answer:
    timings = {"score": 1.0, "reload": reload_ms, "prefill": 2.0}
    x2l = {"timings_ms": timings, "reload_bytes": reload_nbytes, "kv_tokens": {"mixed": 80, "low": 200, "high": 20}}
    return Answer(ttft_s, ttft_s + 1, 4, 4, x2l)


def test_decode_takes_medians_and_leaves_nothing_of_the_time_out():
    windows = [Window(wall, wall - 0.2, 0.1, passes=100, tokens=200) for wall in (1.0, 1.2, 5.0)]
    row = summarize(windows, 2, 600, FLOOR)
    assert row["kv_tokens"] == 300 and row["rows_in_a_pass"] == 2 and row["full"]
    assert row["step_ms"] == 12.0 and row["forward_ms"] == 10.0
    assert (row["engine_ms_per_token"], row["http_ms_per_token"], row["overhead_ms_per_token"]) == (1.0, 0.5, 1.5)
    assert row["floor_ms"] == 7.0 and row["of_floor"] == pytest.approx(7 / 12, abs=1e-3)
    assert not summarize(windows, 4, 600, FLOOR)["full"]  # half of the rows were missing


def test_streams_decode_over_videos_whose_caches_can_have_the_size():
    hour, minute, second = (
        UploadedVideo(name, {}, low, high) for name, low, high in (("h", 900, 90), ("m", 60, 6), ("s", 9, 1))
    )
    assert pick([hour, minute, second], 50) == [minute]
    assert pick([hour, minute, second], 90) == [hour]
    assert pick([hour, minute, second], 5) == [second]
    assert pick([hour, minute, second], 70) == [minute]
    assert pick([hour, minute, second], 2000) == [hour]


def test_caches_larger_than_any_video_are_measured_once():
    assert reachable((300, 500, 100), 250) == {100: 100, 250: 300}
    assert reachable((100, 100, 250), 250) == {100: 100, 250: 250}


def test_follow_up_scales_the_whole_re_load_to_all_chunks():
    top = [answer(0.02, 5, 4000), answer(0.04, 5, 4000), answer(0.03, 5, 4000)]
    row = summarize_follow_up(top, [answer(0.1, 60, 9000)], 0.5, 9.0, FLOOR, 1e6)
    assert row["ttft_ms_p50"] == 30 and row["prefill_over_ttft"] == 300
    assert row["floor_ms"] == (2 * 1000 + 100 * 10 + 4000) / 1e3
    assert row["whole_low_ms"] == 160 and row["whole_low_over_ttft"] == 5.33


def test_a_peer_that_keeps_all_kvs():
    row = full_cache({"full_mb_per_hour": 3200.0, "mb_per_hour": 100.0}, 10**9, FLOOR.paces, 1e5, 80.0)
    assert row["hours_that_fit"] == 24.7 and row["hours_that_fit_here"] == 790.0
    assert row["reload_hour_s"] == 32_000.0
    small = {"full_mb_per_hour": 1.0, "mb_per_hour": 1.0}
    assert full_cache(small, 10**9, FLOOR.paces, 1e9, 80.0)["reload_hour_s"] == 1.0


def test_the_table_says_what_is_met():
    top = [answer(0.03, 5, 4000)]
    common = summarize_follow_up(top, [answer(0.1, 60, 9000)], 1.0, 9.0, FLOOR, 1e6)
    window = Window(1.0, 0.9, 0.01, passes=100, tokens=100)
    resident = {"high_ratio": 32, "mb_per_hour": 110.0, "full_mb_per_hour": 3200.0, "floor_mb_per_hour": 100.0}
    parts = {
        "language_gflop_s": 50.0,
        "language_share_of_matmul": 0.5,
        "vision_frames_per_s": 100.0,
        "vision_share_of_matmul": 0.25,
        "language_frames_per_s": 25.0,
        "decode_frames_per_s": 19.0,
    }
    load = {"questions": 8, "videos": 2, "failures": 0, "tokens_per_s": 80.0, "floor_tokens_per_s": 400.0}
    rows = make_table(
        {
            "follow_up": [{"tier": tier, "whole_low_chunks": [4, 8], **common} for tier in ("memory", "disk")],
            "decode": [summarize([window], 1, 600, FLOOR), summarize([window], 5, 600, FLOOR)],
            "prefill": {
                "mode": "exact",
                "video_minutes": 60.0,
                "s_per_video_minute": 1.4,
                "floor_s_per_video_minute": 0.7,
                "tenths_s": [1.0] * 9 + [2.5],
            },
            "prefill_parts": parts,
            "resident": resident | {"over_floor": 1.09},
            "load": load | {"tokens_per_s_alone": 20.0, "over_alone": 4.0, "p99_over_p50": None},
            "full_kv_prefix_caching": full_cache(resident, 10**9, FLOOR.paces, 1e5, 80.0),
        }
    )
    by_name = {row.name.strip(): row for row in rows}
    memory = by_name["follow-up TTFT p50, L-KVs in host memory"]
    assert memory.met and memory.of_floor == pytest.approx(7 / 30, abs=1e-3)
    again = [row for row in rows if "prefilling the video again" in row.name]
    assert [row.met for row in again] == [True, True]
    whole = [row for row in rows if "whole L cache" in row.name]
    assert [row.met for row in whole] == [True, False] and "scaled from 4 of 8 chunks" in whole[0].name
    decode = [row for row in rows if row.name.startswith("decode")]
    assert [row.met for row in decode] == [False, None] and "only 1 rows in a pass" in decode[1].name
    assert by_name["language model's part"].floor == 100.0 and by_name["language model's part"].met
    assert by_name["decoding"].met is False and by_name["decoding"].target.endswith("(20)")
    assert by_name["its last tenth / its first"].met is False
    assert by_name["resident KVs, against 1/32 of all"].met
    assert by_name["8 questions at once, 2 videos: failures"].met
    assert by_name["that / one at a time (20)"].met is False
    assert not any("p99" in name for name in by_name)
    overhead = [row for row in rows if row.name.startswith("scheduler + API")]
    assert overhead[0].figure == 1.1 and not overhead[0].met
    assert "computed" in next(row.name for row in rows if "full-KV" in row.name)

    lines = format_table([vars(row) for row in rows])
    assert len(lines) == len(rows) + 1 and "floor" in lines[0]
    assert lines[1].endswith("met") and "23%" in lines[1] and "30 ms" in lines[1]


def test_sizes_that_mean_nothing_are_refused():
    good = {"minutes": 1, "load_minutes": 1, "videos": 1, "concurrency": 1, "repeats": 1, "memory_gb": 80.0}
    for wrong in ({"batches": ()}, {"batches": (0,)}, {"kv_tokens": ()}, {"videos": 30}):
        with pytest.raises(ValueError, match=r"from 1 on|at most 29"):
            Sizes(**{**good, "batches": (1,), "kv_tokens": (100,), **wrong})
