"""The sampling grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.video.reader import Sampling

durations_s = st.floats(0.001, 20_000)
rates = st.floats(0.01, 60)


@given(durations_s, rates, st.none() | st.integers(1, 500))
def test_grid_lies_within_the_video(duration_s: float, fps: float, max_frames: int | None) -> None:
    num_frames, interval_s = Sampling(fps, max_frames).grid(duration_s)
    assert num_frames >= 1
    assert num_frames <= (max_frames or num_frames)
    assert (num_frames - 1) * interval_s < duration_s
    if max_frames is None:
        assert interval_s == 1 / fps
        assert num_frames * interval_s >= duration_s - 1e-4


@given(durations_s, rates, st.integers(1, 500))
def test_max_frames_spreads_evenly_over_the_whole_video(duration_s: float, fps: float, max_frames: int) -> None:
    free, _ = Sampling(fps).grid(duration_s)
    num_frames, interval_s = Sampling(fps, max_frames).grid(duration_s)
    assert num_frames == min(free, max_frames)
    if free > max_frames:
        assert num_frames * interval_s == pytest.approx(duration_s)


@pytest.mark.parametrize(
    ("duration_s", "fps", "expected"),
    [(4.0, 1.0, 4), (4.01, 1.0, 5), (0.3, 1.0, 1), (3600.0, 1.0, 3600), (2.0000000001, 2.0, 4), (10 / 3, 3.0, 10)],
)
def test_number_of_frames(duration_s: float, fps: float, expected: int) -> None:
    assert Sampling(fps).grid(duration_s)[0] == expected


@pytest.mark.parametrize("arguments", [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"max_frames": 0}])
def test_senseless_sampling_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(**arguments)
