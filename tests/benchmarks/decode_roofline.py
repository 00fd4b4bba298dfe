"""How close decoding comes to the memory's pace: ``python tests/benchmarks/decode_roofline.py [--tiny] [--out FILE]``.

Random weights of Video-XL-7B's shape (Qwen2-7B) in bfloat16 are made on the device, and mixed caches of 2,000 and
18,000 KV tokens with one and three chunks re-loaded, each row's own. A step's floor is the time that the device, at the
pace of a plain copy, takes to read the weights and all KVs once. Beside it: the same layers in plain PyTorch over
copied caches, as the CPU runs them, and ``generate`` of transformers on the same weights and as many KVs. ``--tune``
tries other block sizes of the kernels first and goes on with the best. ``--tiny`` is for looking whether it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.segments import Part, RotatedKV, SharedCache
from server.bench.circumstances import circumstances, to_json
from server.bench.serving.hardware import measure_copy
from server.bench.serving.model import num_step_weights
from server.models.base import Draw, Step
from server.models.lm.decoder import Decoder, DecoderConfig, Window

SEVEN_B = DecoderConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    head_dim=128,
    rotary_dim=128,
)
TINY = DecoderConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    head_dim=16,
    rotary_dim=16,
)
NUM_PREFIX, NUM_HIGH, NUM_LOW = 14, 45, 720
STEPS, ROOM = 24, 256
GREEDY, NUCLEUS = Draw(), Draw(0.8, 1, 20, 0.8)
REPEATS = 5
GEMV_CANDIDATES = (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 1024, 8), (16, 256, 4), (16, 512, 8)
ATTENTION_CANDIDATES = (  # block, warps, stages, smallest and largest item, items in a wave
    (64, 4, 3, 64, 1024, 132),
    (64, 4, 2, 64, 1024, 132),
    (32, 4, 3, 64, 1024, 132),
    (32, 2, 4, 64, 1024, 132),
    (128, 4, 2, 128, 1024, 132),
    (128, 8, 2, 128, 1024, 132),
    (64, 8, 3, 64, 1024, 132),
    (64, 4, 3, 64, 512, 132),
    (64, 4, 3, 64, 2048, 132),
    (64, 4, 3, 64, 1024, 66),
    (64, 4, 3, 64, 1024, 99),
    (64, 4, 3, 128, 1024, 132),
)


@dataclass(frozen=True)
class Shape:
    """A batch: how many rows, KV tokens of each, chunks re-loaded of each."""

    num_rows: int
    num_tokens: int
    num_low: int

    @property
    def name(self) -> str:
        return f"batch {self.num_rows} x {self.num_tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--profile", action="store_true", help="which kernels a step's time goes to")
    parser.add_argument("--overlap", action="store_true", help="also with kernels launched before the last has ended")
    parser.add_argument("--no-peers", action="store_true", help="without plain PyTorch and transformers")
    parser.add_argument("--batches", default="1,8,32", help="numbers of rows [1,8,32]")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begin_s = time.perf_counter()
    with torch.inference_mode():
        result = circumstances("python", sys.argv[0], bundled=False) | gpu() | run(given)
    result["took_s"] = round(time.perf_counter() - begin_s, 1)
    write(given, result)
    print_table(result)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def gpu() -> dict[str, Any]:
    if not on_gpu():
        return {"gpu": None}
    import triton

    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}


def run(given: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TINY if given.tiny else SEVEN_B
    lengths = (200, 1800) if given.tiny else (2_000, 18_000)
    batches = [int(number) for number in given.batches.split(",")]
    shapes = [Shape(rows, tokens, 1 + 2 * (tokens == lengths[1])) for tokens in lengths for rows in batches]
    result: dict[str, Any] = {"dtype": "bfloat16" if device.type == "cuda" else "float32"}
    dtype = getattr(torch, result["dtype"])
    model = build(config, device, dtype)
    result["copy_gb_s"] = measure_copy(device, 1 << (31 if device.type == "cuda" else 24)) / 1e9
    weights = num_step_weights(model) * dtype.itemsize
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    result["weight_nbytes_a_step"], result["kv_nbytes_a_token"] = weights, per_token
    say(f"copy {result['copy_gb_s']:.0f} GB/s, weights {weights / 1e9:.2f} GB, {per_token} bytes a KV token")
    if on_gpu():
        result["relative_error"] = relative_errors(config, device)
        say(f"relative error {result['relative_error']}")
        result["linear"] = linear_speeds(model, config, given.tune)
        if given.tune:
            result["attention_tuning"] = tune_attention(config, device, dtype, shapes)
    result["rows"] = [measure(model, config, shape, weights, per_token, result, given) for shape in shapes]
    if on_gpu() and given.profile:
        # In the end: after a profiler launches may take longer, for which plain PyTorch and transformers would pay.
        for shape, row in zip(shapes, result["rows"], strict=True):
            caches: list[MixedCache] = [shared_cache(shape, config, model.head_weight) for _ in range(shape.num_rows)]
            steps = [Step(7, cache) for cache in caches]
            row["kernels_us"] = profiled(lambda steps=steps: decoding_of(model, config).step(steps))
    if on_gpu() and given.overlap:
        write(given, result)  # before what may end the process
        try:
            small = [shape for shape in shapes if shape.num_rows * shape.num_tokens < 100_000]
            result["overlapping"] = overlapping(model, config, small)
        except Exception as error:  # all else has been measured
            result["overlapping"] = f"{type(error).__name__}: {error}"[:300]
            say(result["overlapping"])
    return result


def overlapping(model: Decoder, config: DecoderConfig, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """The same with kernels that are launched while those before them end; and whether the logits are the same."""
    from server.models.lm import kernels

    rows = []
    for shape in shapes:
        caches: list[MixedCache] = [shared_cache(shape, config, model.head_weight) for _ in range(shape.num_rows)]
        steps = [Step(7, cache) for cache in caches]
        row: dict[str, Any] = {"rows": shape.num_rows, "tokens": caches[0].num_mixed}
        logits = {}
        for name, launch in (("plain", kernels.LAUNCH), ("overlapping", kernels.OVERLAPPING)):
            before, kernels.LAUNCH = kernels.LAUNCH, launch
            _DECODINGS.clear()
            try:
                row[f"{name}_ms"] = graph_ms(model, config, caches)["graph_ms"]
                logits[name] = decoding_of(model, config).step(steps).logits.clone()
            finally:
                kernels.LAUNCH = before
            for cache in caches:
                cache.length = cache.num_mixed
        row["same_logits"] = bool(torch.equal(*logits.values()))
        say(f"{shape.name}: {row}")
        rows.append(row)
    _DECODINGS.clear()
    return rows


def write(given: argparse.Namespace, result: dict[str, Any]) -> None:
    if given.out:
        given.out.write_text(to_json(result))


def build(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
    return model


def shared_cache(shape: Shape, config: DecoderConfig, like: Tensor) -> SharedCache:
    """Prefix, H-KVs and L-KVs of random numbers, as a video of that length has them."""
    num_high = (shape.num_tokens - NUM_PREFIX - shape.num_low * NUM_LOW) // NUM_HIGH + shape.num_low
    if num_high <= shape.num_low:  # --tiny
        num_high = shape.num_tokens // NUM_HIGH
    chosen = [(2 * place + 1) * num_high // (2 * max(shape.num_low, 1)) for place in range(shape.num_low)]
    rope = config.rope

    def random(tokens: Sequence[int]) -> RotatedKV:
        size = config.num_hidden_layers, config.num_key_value_heads, sum(tokens), config.head_dim
        keys, values = (like.new_empty(size).normal_() for _ in range(2))
        ends = [sum(tokens[: index + 1]) for index in range(len(tokens))]
        spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
        return RotatedKV(keys, values, spans, (0,) * len(tokens), (None,) * len(tokens))

    resident = random([NUM_PREFIX, *[NUM_HIGH] * num_high])
    parts = [Part(resident, 0)]
    for index in range(num_high):
        parts.append(Part(random([NUM_LOW]), 0) if index in chosen else Part(resident, index + 1))
    return SharedCache(parts, rope, room=ROOM)


def copied_cache(shape: Shape, config: DecoderConfig, like: Tensor) -> MixedCache:
    size = config.num_hidden_layers, config.num_key_value_heads, shape.num_tokens, config.head_dim
    keys, values = (like.new_empty(size).normal_() for _ in range(2))
    return MixedCache(ChunkKV(keys, values, "prefix", 1), [], config.rope, room=ROOM)


def measure(
    model: Decoder, config: DecoderConfig, shape: Shape, weights: int, per_token: int, seen: dict[str, Any],
    given: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    like = model.embed_tokens.weight
    row: dict[str, Any] = {"rows": shape.num_rows, "tokens": shape.num_tokens}
    if on_gpu():
        caches: list[MixedCache] = [shared_cache(shape, config, like) for _ in range(shape.num_rows)]
        row["tokens"] = caches[0].num_mixed
        row["segments"] = len(caches[0].segments)
        row["floor_ms"] = (weights + shape.num_rows * caches[0].num_mixed * per_token) / seen["copy_gb_s"] / 1e6
        row |= graph_ms(model, config, caches)
        row["of_roofline"] = row["floor_ms"] / row["graph_ms"]
        row["tokens_per_s"] = 1e3 * shape.num_rows / row["graph_ms"]
        del caches
        torch.cuda.empty_cache()
    if not given.no_peers and shape.num_rows * shape.num_tokens < 200_000:
        row["eager_ms"] = eager_ms(model, [copied_cache(shape, config, like) for _ in range(shape.num_rows)])
    if not given.no_peers and shape.num_rows == 1:
        row |= transformers_ms(model, config, shape.num_tokens)
    if on_gpu():
        torch.cuda.empty_cache()
    say(f"{shape.name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float)))
    return row


def graph_ms(model: Decoder, config: DecoderConfig, caches: list[MixedCache]) -> dict[str, Any]:
    """Milliseconds a step, as the engine takes it: what the host does included; and how long the first one took."""
    decoding = decoding_of(model, config)
    torch.cuda.synchronize()
    before_nbytes, begin_s = torch.cuda.memory_reserved(), time.perf_counter()

    def steps(draw: Draw = GREEDY) -> None:
        """As the engine has them: each is asked for before the tokens of the last one are known."""
        drawn = decoding.step([Step(7, cache, draw) for cache in caches])
        for _ in range(STEPS - 1):
            behind = decoding.step([Step(0, cache, draw, row) for row, cache in enumerate(caches)])
            drawn.wait()
            drawn = behind
        drawn.wait()
        for cache in caches:
            cache.length = cache.num_mixed

    decoding.step([Step(7, cache) for cache in caches]).wait()
    first_ms = 1e3 * (time.perf_counter() - begin_s)
    steps()
    times_ms = sorted(1e3 * median_s(steps, 1) / STEPS for _ in range(REPEATS))
    row: dict[str, Any] = {
        "graph_ms": statistics.median(times_ms),
        "graph_ms_all": times_ms,
        "first_step_ms": first_ms,
        "graph_nbytes": torch.cuda.memory_reserved() - before_nbytes,
        "captured": bool(decoding._graphs),
    }
    captured = decoding._graphs.get(decoding._shape(len(caches), 1))
    if captured is not None:
        row["device_ms"] = 1e3 * median_s(captured.replay, 10)
    steps(NUCLEUS)
    row["nucleus_ms"] = statistics.median(1e3 * median_s(lambda: steps(NUCLEUS), 1) / STEPS for _ in range(REPEATS))
    return row


_DECODINGS: dict[int, Any] = {}


def decoding_of(model: Decoder, config: DecoderConfig) -> Any:
    from server.models.lm.decode import Decoding

    if id(model) not in _DECODINGS:
        _DECODINGS[id(model)] = Decoding(
            model,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_positions=config.max_position_embeddings,
            max_rows=64,
        )
    return _DECODINGS[id(model)]


def eager_ms(model: Decoder, caches: list[MixedCache]) -> float:
    device = model.embed_tokens.weight.device
    ids = torch.full((1,), 7, device=device)

    def step() -> None:
        hidden, _ = model([Window(model.embed_tokens(ids), cache) for cache in caches])
        model.logits(hidden).argmax(-1).tolist()

    step()
    return 1e3 * median_s(step, REPEATS)


def transformers_ms(model: Decoder, config: DecoderConfig, num_tokens: int) -> dict[str, Any]:
    """What ``generate`` takes for a token, over a cache of so many, on the very weights of ``model``."""
    import transformers
    from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, StaticCache

    transformers.logging.set_verbosity_error()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = Qwen2Config(
        **{name: getattr(config, name) for name in sizes},
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    like = model.embed_tokens.weight
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(theirs)
    names = set(peer.state_dict())
    own = {("lm_head.weight" if n == "lm_head.weight" else f"model.{n}"): p for n, p in model.state_dict().items()}
    peer.load_state_dict({name: own[name] for name in names}, assign=True)
    with torch.device(like.device):
        peer.model.rotary_emb = type(peer.model.rotary_emb)(theirs)
    peer = peer.eval().requires_grad_(False)
    few, many = 2, 2 + STEPS
    row: dict[str, Any] = {}
    for kind in ("dynamic", "static"):

        def generate(num_new: int, kind: str = kind) -> float:
            size = 1, config.num_key_value_heads, num_tokens, config.head_dim
            if kind == "dynamic":
                cache: Any = DynamicCache(config=theirs)
            else:
                cache = StaticCache(config=theirs, max_cache_len=num_tokens + many + 8)
            for layer in range(config.num_hidden_layers):
                cache.update(like.new_empty(size).normal_(), like.new_empty(size).normal_(), layer)
            ids = torch.full((1, num_tokens + 1), 7, device=like.device)
            greedy = GenerationConfig(
                max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0, disable_compile=True
            )
            synchronize()
            begin_s = time.perf_counter()
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, generation_config=greedy
            )
            synchronize()
            if out.shape[1] != num_tokens + 1 + num_new:
                raise RuntimeError(f"{out.shape[1] - num_tokens - 1} tokens were generated, not {num_new}")
            return time.perf_counter() - begin_s

        try:
            generate(few)
            times_ms = [1e3 * (generate(many) - generate(few)) / STEPS for _ in range(REPEATS)]
            row[f"transformers_{kind}_ms"] = statistics.median(times_ms)
        except Exception as error:  # another version's peculiarity must not cost the whole run
            row[f"transformers_{kind}"] = f"{type(error).__name__}: {error}"[:300]
            say(row[f"transformers_{kind}"])
    row["transformers"] = transformers.__version__
    return row


def linear_speeds(model: Decoder, config: DecoderConfig, tune: bool) -> list[dict[str, Any]]:
    """GB/s of every projection's weights, layer after layer: by the library for 1, 8 and 32 rows, and by the kernel."""
    from server.models.lm import kernels

    decoding_of(model, config)  # fuses the layers
    like = model.embed_tokens.weight
    layers: Any = model._fused
    matrices = (
        ("qkv", [layer._qkv for layer in layers], False),
        ("o", [layer._o for layer in layers], False),
        ("gate_up", [layer._gate_up for layer in layers], True),
        ("down", [layer._down for layer in layers], False),
        ("head", [model.head_weight] * 4, False),
    )
    table = []
    for name, weights, gated in matrices:
        num_out, num_in = weights[0].shape
        row: dict[str, Any] = {"name": name, "out": num_out, "in": num_in}

        def gb_s(one: Callable[[Tensor], object], weights: list[Tensor] = weights) -> float:
            return sum(weight.nbytes for weight in weights) / graphed_s(lambda: [one(w) for w in weights]) / 1e9

        for num_rows in (1, 8, 32):
            x = torch.randn(num_rows, num_in, dtype=like.dtype, device=like.device)
            row[f"library_{num_rows}"] = gb_s(lambda w, x=x: functional.linear(x, w))
        x = torch.randn(1, num_in, dtype=like.dtype, device=like.device)
        row["kernel_1"] = gb_s(lambda w, x=x, gated=gated: kernels.gemv(x, w, gated=gated))
        if tune:
            tried = {}
            for blocks in GEMV_CANDIDATES:
                kernels.GEMV_BLOCKS[num_out, num_in] = blocks
                tried[blocks] = gb_s(lambda w, x=x, gated=gated: kernels.gemv(x, w, gated=gated))
            best = max(tried, key=lambda blocks: tried[blocks])
            kernels.GEMV_BLOCKS[num_out, num_in] = best
            row |= {"tried": {str(blocks): speed for blocks, speed in tried.items()}, "best": best}
            row["kernel_1"] = tried[best]
        say(" ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        table.append(row)
    return table


def attention_gb_s(decoding_plan: Any, queries: Tensor, config: DecoderConfig, tables: Any, nbytes: int) -> float:
    from server.models.lm import kernels

    lengths, positions, table = tables

    def layers() -> None:
        for layer in range(config.num_hidden_layers):
            kernels.attend(
                queries, decoding_plan.items[: decoding_plan.capacity], decoding_plan.ranges, lengths, positions, table,
                layer, config.num_key_value_heads,
            )  # fmt: skip

    return nbytes / graphed_s(layers) / 1e9


@contextmanager
def attention(block: int, num_warps: int, num_stages: int, smallest: int, largest: int, wave: int) -> Iterator[None]:
    """With other block sizes than the kernel's own."""
    from server.models.lm import kernels, plan

    defaults = kernels.attend.__kwdefaults__
    assert defaults is not None
    before = dict(defaults), (plan._SMALLEST_ITEM, plan._LARGEST_ITEM, plan._WAVE)
    try:
        defaults.update(block=block, num_warps=num_warps, num_stages=num_stages)
        plan._SMALLEST_ITEM, plan._LARGEST_ITEM, plan._WAVE = smallest, largest, wave
        yield
    finally:
        defaults.update(before[0])
        plan._SMALLEST_ITEM, plan._LARGEST_ITEM, plan._WAVE = before[1]


def tune_attention(
    config: DecoderConfig, device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]
) -> list[dict[str, Any]]:
    """GB/s of KVs that attention reads, merging included, for several block and piece sizes; leaves the best on."""
    from server.models.lm import kernels
    from server.models.lm import plan as plans

    like = torch.empty((), dtype=dtype, device=device)
    table = torch.stack(config.rope.tables(torch.arange(config.max_position_embeddings, device=device), dtype), dim=1)
    scores: dict[tuple[int, ...], float] = {}
    found = []
    for shape in (shapes[0], next(s for s in shapes if s.num_tokens == shapes[-1].num_tokens), shapes[-1]):
        caches: list[MixedCache] = [shared_cache(shape, config, like) for _ in range(shape.num_rows)]
        for cache in caches:
            cache.reserve(1)
        nbytes = sum(cache.num_mixed for cache in caches) * 2 * config.num_hidden_layers
        nbytes *= config.num_key_value_heads * config.head_dim * dtype.itemsize
        queries = like.new_empty(shape.num_rows, config.num_attention_heads, config.head_dim).normal_()
        state = [torch.zeros(shape.num_rows, dtype=torch.int64, device=device) for _ in range(2)]
        state[1] += caches[0].next_position
        for candidate in ATTENTION_CANDIDATES:
            with attention(*candidate):
                plan = plans.Plan(64, device)
                plan.update([plans.Tile(cache, cache.num_own, 1) for cache in caches], 1)
                speed = attention_gb_s(plan, queries, config, (*state, table), nbytes)
            scores[candidate] = scores.get(candidate, 1.0) * speed
            found.append({"shape": shape.name, "candidate": candidate, "gb_s": speed})
            say(f"{shape.name} block, warps, stages, smallest, largest, wave {candidate}: {speed:.0f} GB/s")
        del caches
        torch.cuda.empty_cache()
    best = max(scores, key=lambda candidate: scores[candidate])
    say(f"best {best}")
    defaults = kernels.attend.__kwdefaults__
    assert defaults is not None
    defaults.update(block=best[0], num_warps=best[1], num_stages=best[2])
    plans._SMALLEST_ITEM, plans._LARGEST_ITEM, plans._WAVE = best[3:]
    return found


def relative_errors(config: DecoderConfig, device: torch.device) -> dict[str, float]:
    """Of the logits of two layers of these widths, for several steps over shared KVs: the kernels in bfloat16, and
    plain PyTorch over copied KVs in bfloat16, both against plain PyTorch in float32."""
    import dataclasses

    from server.models.lm.decode import Decoding

    small = dataclasses.replace(config, num_hidden_layers=2)
    torch.manual_seed(0)
    exact = build(small, device, torch.float32)
    half, plain = (build(small, device, torch.bfloat16) for _ in range(2))
    for model in (half, plain):
        model.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    decoding = Decoding(
        half,
        heads=small.num_attention_heads,
        kv_heads=small.num_key_value_heads,
        head_dim=small.head_dim,
        max_positions=small.max_position_embeddings,
        max_rows=4,
    )
    errors: dict[str, float] = {}
    for num_rows in (1, 4):
        shared = [shared_cache(Shape(num_rows, 5000, 2), small, half.head_weight) for _ in range(num_rows)]
        copies = [contiguous(cache, torch.bfloat16) for cache in shared]
        exacts = [contiguous(cache, torch.float32) for cache in shared]
        worst: dict[str, float] = {"kernels": 0.0, "plain": 0.0}
        for step in range(4):
            tokens = [(5 + 31 * step + row) % small.vocab_size for row in range(num_rows)]
            ids = torch.tensor(tokens, device=device)
            seen = {"kernels": decoding.step([Step(t, c) for t, c in zip(tokens, shared, strict=True)]).logits}
            for model, caches, name in ((plain, copies, "plain"), (exact, exacts, "exact")):
                hidden, _ = model([Window(model.embed_tokens(i), c) for i, c in zip(ids.split(1), caches, strict=True)])
                seen[name] = model.logits(hidden)
                for cache in caches:
                    cache.advance(1)
            for name in worst:
                error = (seen[name] - seen["exact"]).norm() / seen["exact"].norm()
                worst[name] = max(worst[name], float(error)) if bool(error == error) else float("nan")
        errors |= {f"{name}_{num_rows}": error for name, error in worst.items()}
    return errors


def contiguous(cache: SharedCache, dtype: torch.dtype) -> MixedCache:
    """The same as a copy, its keys rotated to where they stand; in float32 from the start."""
    parts = []
    for segment in cache.segments:
        offset = torch.full((segment.num_tokens,), segment.offset, device=segment.keys.device)
        keys = cache.rope.rotate(segment.keys.float(), *cache.rope.tables(offset, torch.float32))
        parts.append((keys, segment.values.float()))
    keys, values = (torch.cat(part, dim=2).to(dtype) for part in zip(*parts, strict=True))
    made = MixedCache(ChunkKV(keys, values, "prefix", 1), [], cache.rope, room=ROOM)
    made.keys[:, :, : made.length] = keys  # it stands rotated already
    return made


def profiled(step: Callable[[], object]) -> dict[str, list[float]]:
    """Kernel -> how many in a step, and their microseconds together."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.device_time_total > 0]
        events.sort(key=lambda event: -event.device_time_total)
        return {event.key[:80]: [event.count / 3, event.device_time_total / 3] for event in events[:16]}
    except Exception as error:
        say(f"no profile: {error}")
        return {}


def graphed_s(work: Callable[[], object]) -> float:
    """Seconds of ``work`` on the device, without what it takes to launch it."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return median_s(graph.replay, 7)


def median_s(work: Callable[[], object], repeats: int) -> float:
    work_s = []
    for _ in range(repeats):
        synchronize()
        begin_s = time.perf_counter()
        work()
        synchronize()
        work_s.append(time.perf_counter() - begin_s)
    return statistics.median(work_s)


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def say(line: str) -> None:
    print(line, flush=True)


def print_table(result: dict[str, Any]) -> None:
    columns = ("rows", "tokens", "floor_ms", "graph_ms", "device_ms", "nucleus_ms",
               "of_roofline", "tokens_per_s", "eager_ms",
               "transformers_dynamic_ms", "transformers_static_ms")  # fmt: skip
    say(" | ".join(columns))
    for row in result["rows"]:
        cells = [row.get(name, "-") for name in columns]
        say(" | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    say(f"took {result['took_s']} s; copy {result['copy_gb_s']:.0f} GB/s; errors {result.get('relative_error')}")


if __name__ == "__main__":
    main()
