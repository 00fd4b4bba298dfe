"""What ``x2l serve`` says that it will do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from tiny_transformers import save_qwen2_5_vl

from server.app import open_backend
from server.cli.plan import longest_videos, plan
from server.config import Settings
from server.engine.fit import default_kept_nbytes
from server.engine.options import EngineOptions
from server.models.registry import load_model


def test_no_longer_video_is_promised_than_is_taken() -> None:
    model = load_model("tiny", device="cpu")
    clock_ends_s = model.spec.max_duration_s
    assert clock_ends_s is not None and clock_ends_s < Settings().max_duration_s
    # Its positions would do for longer, so that no video comes to the cheaper modes.
    assert model.prefill_modes(1280, 720, 1.0)[0][1] > clock_ends_s
    for settings, longest_s in (
        (Settings(), clock_ends_s),
        (Settings(max_duration_s=600), 600),
        (Settings(max_frames=50), 50 / model.spec.fps),
    ):
        assert list(longest_videos(settings, model)) == [("exact", longest_s)]


def test_longer_videos_than_fit_into_memory_take_a_cheaper_mode() -> None:
    model = load_model("tiny", device="cpu")
    spec = model.spec
    half_an_hour = 57 * spec.frames_per_chunk
    num_visual = model.num_visual_tokens(half_an_hour, 1280, 720)
    memory_nbytes = model.token_nbytes * model.num_remembered("exact", num_visual, 57)
    (first, exact_s), (second, most_s) = longest_videos(Settings(), model, memory_nbytes)
    assert (first, exact_s) == ("exact", half_an_hour) and (second, most_s) == ("recent-2", spec.max_duration_s)


def test_the_plan_tells_whose_limit_it_is() -> None:
    model = load_model("tiny", device="cpu")
    for settings, words in (
        (Settings(), "exact up to 1:40:00, where the model's clock ends"),
        (Settings(max_duration_s=600), "exact up to 0:10:00, as --max-duration-s says"),
        (Settings(max_frames=50), "exact up to 0:00:50, as --max-frames says"),
    ):
        assert plan(settings, model, EngineOptions())["prefill"] == words


def test_the_plan_names_the_compressor_where_there_is_one(tmp_path: Path) -> None:
    save_qwen2_5_vl(tmp_path)
    chosen = load_model(str(tmp_path), device="cpu", compressor="keydiff")
    assert plan(Settings(), chosen, EngineOptions())["compressor"] == "keydiff"
    assert plan(Settings(), load_model(str(tmp_path), device="cpu"), EngineOptions())["compressor"] == "stride"
    assert "compressor" not in plan(Settings(), load_model("tiny", device="cpu"), EngineOptions())


def test_how_many_hours_have_room() -> None:
    model = load_model("tiny", device="cpu")
    hour_nbytes = 3600 * model.spec.tokens_per_frame * model.token_nbytes
    low_nbytes, high_nbytes = hour_nbytes // model.spec.low_ratio, hour_nbytes // model.spec.high_ratio
    settings = Settings(store_quota_bytes=3 * (low_nbytes + high_nbytes))
    told = plan(settings, model, EngineOptions(resident_nbytes=5 * high_nbytes))["room"]
    in_store = "in the store, kept files apart (--store-quota-bytes)"
    assert told == f"KVs of about 5.0 hours on the device (--gpu-kv-budget), 3.0 hours {in_store}"
    for budget_nbytes, words in ((high_nbytes // 2, "30 minutes"), (2000 * high_nbytes, "2,000 hours")):
        assert f"about {words} on" in plan(settings, model, EngineOptions(resident_nbytes=budget_nbytes))["room"]
    with contextlib.closing(open_backend(Settings(store="memory://", device="cpu", prefill_share=0.3))) as backend:
        options = backend.engine.options
    assert options.resident_nbytes == options.shared_low_nbytes == default_kept_nbytes(model.device, None) == 2 << 30
    assert options.prefill_share == 0.3


def test_levels_that_are_alike_are_warned_of() -> None:
    alike = load_model("tiny", low_ratio=2, high_ratio=2)
    assert "re-loading chunks gains nothing" in plan(Settings(), alike, EngineOptions())["warning"]
    assert "warning" not in plan(Settings(), load_model("tiny"), EngineOptions())


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_bounds_without_room_for_a_chunk_stop_the_start(kv_dtype: str) -> None:
    for name, less in (("gpu_kv_budget", 70_000), ("store_quota_bytes", 160_000)):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=rf"{option} must be at least \d+ bytes") as refused:
            open_backend(Settings(store="memory://", device="cpu", kv_dtype=kv_dtype, **{name: less}))
        least = int(str(refused.value).split()[5])
        open_backend(Settings(store="memory://", device="cpu", kv_dtype=kv_dtype, **{name: least})).close()
