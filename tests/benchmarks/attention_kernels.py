"""Which attention kernels run at the shapes of a 7B model, and what they take.

``python tests/benchmarks/attention_kernels.py [--out RESULT.json]``

For prefill and decode over caches of several lengths: the GPU kernels that ran, microseconds, and the memory that the
call took at most, for this server's own call, for PyTorch's public function with a whole mask (what it would do
without), and the largest difference of the former from float32. Needs a GPU. With ``--out FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import to_json, write
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from server.bench.circumstances import circumstances
from server.models.lm.attention import attend, causal_mask

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
SHAPES = {
    "prefix": (25, 0),
    "Video-XL, L pass, first chunk": (2160, 25),
    "Video-XL, L pass, hour's end, high-memory": (2160, 17_000),
    "Qwen2.5-VL chunk, hour's end, exact": (1072, 120_000),
    "question over the H-KVs of an hour": (40, 17_600),
    "decode, 2k": (1, 2_000),
    "decode, 18k": (1, 18_000),
}
"""New tokens, and cached ones."""
NUM_REPEATS = 20


def measure(call: Callable[[], Tensor]) -> dict[str, Any]:
    """Kernels, median microseconds, and MB at most beyond what was there."""
    try:
        call()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"error": str(error).partition("\n")[0]}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    times_us = []
    for _ in range(NUM_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times_us.append(begin.elapsed_time(end) * 1000)
    kernels = sorted({event.key.partition("<")[0][-60:] for event in profiler.key_averages()})
    return {
        "us": round(sorted(times_us)[NUM_REPEATS // 2], 1),
        "peak_mb": round(peak / 1e6, 1),
        "kernels": kernels,
    }


def compare(num_tokens: int, num_cached: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(heads: int, tokens: int) -> Tensor:
        return torch.randn(heads, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)

    total = num_cached + num_tokens
    queries = drawn(HEADS, num_tokens)
    # As in a cache: a view of larger buffers.
    keys, values = (drawn(KV_HEADS, total + 500)[:, :total] for _ in range(2))
    mask = torch.ones(num_tokens, total, dtype=torch.bool, device="cuda").tril(num_cached)

    def ours() -> Tensor:
        return attend(queries, keys, values, causal_mask(num_tokens, num_cached, queries, HEAD_DIM))

    def masked() -> Tensor:
        return functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )[0]

    found = {"ours": measure(ours), "public function with a mask": measure(masked)}
    flops = 4 * HEADS * HEAD_DIM * num_tokens * (num_cached + num_tokens / 2)
    found["ours"]["tflops"] = round(flops / found["ours"]["us"] / 1e6, 1)
    few = slice(-64, None)  # of the queries: the reference writes all weights out
    exact = functional.scaled_dot_product_attention(
        queries[None, :, few].float(), keys[None].float(), values[None].float(), attn_mask=mask[few], enable_gqa=True
    )[0]
    found["largest difference from float32"] = float((ours()[:, few].float() - exact).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    result: dict[str, Any] = circumstances("python", sys.argv[0], bundled=False)
    result |= {"gpu": torch.cuda.get_device_name(), "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    result["shapes"] = {}
    for name, (num_tokens, num_cached) in SHAPES.items():
        found = compare(num_tokens, num_cached)
        result["shapes"][name] = {"tokens": num_tokens, "cached": num_cached, **found}
        print(name, to_json(found), flush=True)
        write(result, given.out)


if __name__ == "__main__":
    main()
