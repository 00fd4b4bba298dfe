from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.tiny import world


@given(
    seed=st.integers(0, 2**31),
    chunks=st.integers(1, 18),
    durations=st.sets(st.integers(1, 8), min_size=1),
    cut=st.booleans(),
    p_static=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_shots_objects_and_plates_keep_the_worlds_rules(
    seed: int, chunks: int, durations: set[int], cut: bool, p_static: float
) -> None:
    script = world.sample_scripts(
        2,
        chunks,
        torch.Generator().manual_seed(seed),
        durations=dict.fromkeys(durations, 1.0),
        p_static=p_static,
        cut_at_chunks=cut,
    )
    for video in range(2):
        starts, objects = script.starts[video].tolist(), script.objects[video].tolist()
        shots = [(s, s + int(script.lengths[video, s])) for s in sorted(set(starts))]
        assert shots[0][0] == 0 and shots[-1][1] == chunks * world.CHUNK_TICKS
        assert all(one[1] == two[0] for one, two in pairwise(shots))
        assert max(end - start for start, end in shots) <= max(durations)
        if cut:
            assert all(start // world.CHUNK_TICKS == (end - 1) // world.CHUNK_TICKS for start, end in shots)
        shown = [objects[start] for start, _ in shots]
        assert all(one != two for one, two in pairwise(shown))
        for start, end in shots:
            assert len({objects[tick] for tick in range(start, end)}) == 1
            distinct = 1 if bool(script.static[video, start]) else end - start
            for place in (0, 1):
                assert len(set(script.plates[video, start:end, place].tolist())) == distinct
            if distinct == 1:
                assert script.codes[video, start:end].unique(dim=0).shape[0] == 1
            assert script.looks[video, start:end, : world.NUM_SHOT_LOOKS].unique(dim=0).shape[0] == 1
        num_targets = int(script.num_targets[video])
        assert num_targets >= 1
        for target, start in zip(
            script.targets[video, :num_targets].tolist(), script.target_starts[video].tolist(), strict=False
        ):
            assert [s for s, _ in shots if objects[s] == target] == [start]
        assert not set(script.absent[video].tolist()) & set(objects)
        assert all(shown.count(counted) <= 4 for counted in script.counted[video].tolist())


def test_a_full_video_has_24_targets_and_repeated_objects() -> None:
    script = world.sample_scripts(8, 16, torch.Generator().manual_seed(3))
    assert script.num_targets.tolist() == [24] * 8
    first = script.starts == torch.arange(16 * world.CHUNK_TICKS)
    counts = [[int((first[v] & (script.objects[v] == c)).sum()) for c in script.counted[v]] for v in range(8)]
    assert counts == [[4, 3, 2]] * 8


def test_training_seeds_are_apart_from_the_benchmarks() -> None:
    with pytest.raises(ValueError, match="1000000"):
        world.training_generator(999_999)
    assert world.training_generator(1_000_000).initial_seed() == 1_000_000


@pytest.mark.parametrize("durations", [{}, {0: 1.0}, {9: 1.0}])
def test_impossible_shot_lengths_are_refused(durations: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="shot lengths"):
        world.sample_scripts(1, 1, torch.Generator(), durations=durations)
