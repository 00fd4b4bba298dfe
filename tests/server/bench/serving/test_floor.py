from __future__ import annotations

import pytest
import torch

from compression.cache import KVCache
from compression.kv import ChunkKV
from server.bench.serving.floor import Floor
from server.bench.serving.hardware import Paces, drop_pages, measure_copy, measure_disk
from server.bench.serving.model import Parts, counted, num_step_weights
from server.models.lm.decoder import Decoder, DecoderConfig, Window
from server.models.slices import whole

FLOOR = Floor(Paces(copy=1000.0, to_device=100.0, matmul=1e6), weight_nbytes=500, token_nbytes=10)
CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    head_dim=4,
    rotary_dim=4,
)


def test_a_step_reads_weights_and_kvs_once():
    assert FLOOR.step_s(0) == 0.5
    assert FLOOR.step_s(100) == 1.5


def test_a_first_token_reads_the_weights_twice_and_waits_for_its_kvs():
    assert FLOOR.first_token_s(20, 30, 50, None) == 1.5
    assert FLOOR.first_token_s(20, 30, 50, 25.0) == 3.5


def test_questions_at_once_are_read_in_turn_and_decoded_together():
    assert FLOOR.load_s([(20, 30), (20, 70)], 3) == 1.5 + 1.9 + 2 * (0.5 + 1.0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_every_weight_but_embeddings_and_those_of_summary_tokens(tied):
    decoder = Decoder(DecoderConfig(**{**vars_of(CONFIG), "tie_word_embeddings": tied}))
    query, key = 8 * 8 + 8, 2 * (8 * 4 + 4)
    layer = query + key + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert num_step_weights(decoder) == 2 * layer + 8 + 11 * 8


def test_operations_of_a_prefill_are_those_of_its_matrices_and_of_what_its_tokens_see():
    decoder = Decoder(CONFIG)
    past = torch.randn(2, 1, 5, 4)
    cache = KVCache(ChunkKV(past, past, "prefix", 1), decoder.rope, capacity=16)
    cache.append(ChunkKV(past, past, "prefix", 1))
    projections = (8 * 8 + 8) + 2 * (8 * 4 + 4)
    first_layer = projections + 8 * 8 + 3 * 8 * 12 + 2 * 8
    expected = 2 * (first_layer + projections) * 3 + 4 * 8 * (6 + 7 + 8)
    windows = [Window(torch.randn(3, 8), cache)]
    with torch.inference_mode(), counted(decoder, 8) as flops:
        whole(decoder.slices(windows))
    assert flops[0] == expected
    whole(decoder.slices(windows))
    assert flops[0] == expected  # it no longer counts


def test_parts_of_prefill_are_shares_of_a_matrix_product():
    parts = Parts(2, 60, 1.0, vision_s=2.0, vision_flops=10**9, language_s=3.0, language_flops=6 * 10**9)
    summary = parts.summary(4e9)
    assert (summary["vision_frames_per_s"], summary["language_frames_per_s"]) == (30, 20)
    assert (summary["vision_share_of_matmul"], summary["language_share_of_matmul"]) == (0.125, 0.5)
    assert summary["language_gflop_s"] == 2
    assert (summary["s_per_video_minute"], summary["floor_s_per_video_minute"]) == (5, 1.75)


def test_paces_are_of_bytes_that_were_moved(tmp_path):
    assert measure_copy(torch.device("cpu"), 1 << 20) > 0
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 20))
    drop_pages([path])
    assert measure_disk([path, path]) > 0
    assert path.read_bytes() == bytes(1 << 20)


def vars_of(config: DecoderConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
