"""What ``x2l serve`` says that it will do."""

from __future__ import annotations

from server.cli.plan import longest_videos
from server.config import Settings
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
