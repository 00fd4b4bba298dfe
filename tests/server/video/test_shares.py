"""How frames are shared out among processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.video import shares
from server.video.shares import Split

FRAME_NBYTES = 640 * 360 * 3
GB = 1 << 30


def places(frames_per_segment: list[int], num_decoded: int = 25) -> NDArray[np.int64]:
    keys = np.repeat(np.arange(len(frames_per_segment)) * 1000, frames_per_segment)
    return np.stack([np.arange(len(keys)) * 10, keys, np.full(len(keys), num_decoded)])


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1 << 20, 4 * GB),
    st.sampled_from([320 * 180 * 3, FRAME_NBYTES, 3840 * 2160 * 3]),
)
def test_a_process_decodes_whole_segments_within_its_memory(
    segments: list[int], max_processes: int, memory_nbytes: int, frame_nbytes: int
) -> None:
    found = places(segments)
    split = Split(found, frame_nbytes, memory_nbytes, max_processes)
    assert 1 <= split.num_processes <= min(max_processes, len(segments))
    assert len(split.turns) == found.shape[1]
    assert set(split.turns) == set(range(split.num_processes))
    assert all(len(set(split.turns[found[1] == key])) == 1 for key in set(found[1].tolist()))
    assert split.num_processes * split.memory_nbytes <= memory_nbytes
    assert split.ahead_nbytes < split.memory_nbytes
    if split.num_processes > 1:
        assert split.ahead_nbytes >= max(segments) * frame_nbytes


def test_as_many_processes_as_cores_where_there_is_enough_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "num_cores", lambda: 16)
    assert Split(places([2] * 1800), FRAME_NBYTES, 3 * GB, None).num_processes == 16
    assert Split(places([2] * 5), FRAME_NBYTES, 3 * GB, None).num_processes == 1
    assert Split(places([2] * 5, num_decoded=700), FRAME_NBYTES, 3 * GB, None).num_processes == 5
    assert Split(places([3600]), FRAME_NBYTES, 3 * GB, None).num_processes == 1
    assert Split(places([2] * 1800), FRAME_NBYTES, GB, None).num_processes < 16


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_container_may_have_fewer_cores_than_its_host(
    tmp_path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(shares, "CGROUP_CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(shares.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert shares.num_cores() == expected
