"""Runs every case of an oracle file through the production code path and compares every array.

The path begins with the files: the case's weights are written as a checkpoint in the public layout, and what is checked
is the model that `--model FOLDER` loads. What a file does not hold (the vision tower, or the language model) is random.

    python tests/oracle_check.py FILE.npz [FILE.npz ...]

A case with `ratios` is bi-level (edge rule on), one with a scalar `ratio` is uniform (edge rule off), a file with
`frames_u8` is a vision file. Prints the largest difference per case; exits with 1 past the tolerance, with 2 where a
file holds no case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import TINY, random_weights, word_tokenizer, write_checkpoint
from torch import Tensor

from compression.cache import KVCache
from compression.kv import ChunkKV
from compression.mixed import MixedCache
from server.models.base import Row
from server.models.registry import load_model
from server.models.videoxl.clip import normalize
from server.models.videoxl.compression_config import CompressionConfig
from server.models.videoxl.model import VideoXL
from server.video.frames import Frames

ATOL, RTOL = 3e-4, 1e-3


class Comparison:
    """The differences seen in one case."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_arrays = 0
        self.largest = 0.0
        self.failures: list[str] = []

    def close(self, what: str, ours: Tensor, expected: np.ndarray) -> None:
        want = torch.from_numpy(expected)
        self.num_arrays += 1
        if ours.shape != want.shape:
            self.failures.append(f"{what}: shape {tuple(ours.shape)}, expected {tuple(want.shape)}")
            return
        if want.numel():
            self.largest = max(self.largest, (ours - want).abs().max().item())
        if not torch.allclose(ours, want, atol=ATOL, rtol=RTOL):
            self.failures.append(f"{what}: differs by {(ours - want).abs().max().item():.3g}")

    def same(self, what: str, ours: object, expected: object) -> None:
        self.num_arrays += 1
        if ours != expected:
            self.failures.append(f"{what}: {ours}, expected {expected}")


class Case:
    """The arrays of one case, by their names behind the case's own."""

    def __init__(self, file: Any, name: str) -> None:
        self.name = name
        self._file = file
        self.names = [key.removeprefix(f"{name}/") for key in file.files if key.startswith(f"{name}/")]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        array: np.ndarray = self._file[f"{self.name}/{name}"]
        return array


class Steps:
    """Every forward of a prefill: which tokens were VSTs, and how many KV tokens stood before them."""

    def __init__(self, model: VideoXL) -> None:
        self._forwards: list[tuple[int, list[int]]] = []
        self._passes: list[list[tuple[int, list[int]]]] = [[], []]
        self._decoder, self._slices = model.decoder, model.decoder.slices
        model.decoder.slices = self._record

    def _record(self, windows: Any, num_layers: int | None = None) -> Any:
        (window,) = windows
        plain = torch.zeros(len(window.embeddings), dtype=torch.bool)
        is_vst = plain if window.is_vst is None else window.is_vst
        self._forwards.append((window.cache.length, is_vst.int().tolist()))
        return self._slices(windows, num_layers)

    def end_chunk(self) -> None:
        """Sorts what ran since the last chunk into the two passes; a forward that both share ran once."""
        if not self._passes[0]:
            prefix = self._forwards.pop(0)
            for forwards in self._passes:
                forwards.append(prefix)
        self._passes[0].append(self._forwards[0])
        self._passes[1].append(self._forwards[-1])
        self._forwards.clear()

    def compare(self, result: Comparison, case: Case) -> None:
        del self._decoder.slices
        if "steps/table" not in case:
            return
        table = case["steps/table"].tolist()
        half = len(table) // 2
        for number, (start, forwards) in enumerate(zip((0, half), self._passes, strict=True)):
            # The last row of a pass is a single tail token that the release runs and throws away.
            for row, (cached, is_vst) in enumerate(forwards, start):
                _, num_tokens, num_cached, _, num_vst, _ = table[row]
                expected = [num_tokens, num_cached, num_vst]
                result.same(f"steps/table, pass {number}, row {row}", [len(is_vst), cached, sum(is_vst)], expected)
                if f"steps/{row}/is_vst" in case:
                    result.same(f"steps/{row}/is_vst", is_vst, case[f"steps/{row}/is_vst"].tolist())


def check_file(path: Path) -> list[Comparison]:
    """All cases of one file; none where the file holds no case."""
    file = np.load(path)
    if "config_json" not in file.files:
        return []
    config = json.loads(bytes(file["config_json"]).decode())
    weights = {n.removeprefix("weights/"): torch.from_numpy(file[n]) for n in file.files if n.startswith("weights/")}
    if "frames_u8" in file.files:
        return [_check_vision(file, config, weights)]
    names = sorted({n.split("/")[0] for n in file.files if "/" in n} - {"weights"})
    return [_check_case(Case(file, name), config, weights) for name in names]


def load(config: dict[str, Any], weights: dict[str, Tensor]) -> VideoXL:
    """A model out of a written checkpoint."""
    projector = weights.get("model.mm_projector.2.weight")
    whole = {**TINY, "hidden_size": TINY["hidden_size"] if projector is None else len(projector), **config}
    # Cases cut their visual tokens into chunks themselves, which need not be whole frames.
    grid = whole["vision_config"]["image_size"] // whole["vision_config"]["patch_size"]
    whole["beacon_window"] = whole["beacon_stride"] = (grid // whole["mm_spatial_pool_stride"]) ** 2
    with tempfile.TemporaryDirectory() as folder:
        tensors = random_weights(whole) | weights
        write_checkpoint(Path(folder), tensors, whole, files="sharded", tokenizer=word_tokenizer())
        model = load_model(folder, device="cpu", dtype="float32")
    assert isinstance(model, VideoXL)
    return model


def _check_vision(file: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> Comparison:
    result = Comparison("vision")
    model = load(config, weights)
    frames = Frames(file["frames_u8"], np.arange(len(file["frames_u8"]), dtype=np.float64))
    pixels = model.preprocess(frames)
    result.close("pixel_values", normalize(pixels), file["pixel_values"])
    result.close("features", model.encode(pixels, frames.times_s), file["features"])
    return result


def build(config: dict[str, Any], weights: dict[str, Tensor], case: Case) -> VideoXL:
    """The loaded model with one case's ratios and prefix."""
    model = load(config, weights)
    if "ratios" in case:
        low, high = (int(ratio) for ratio in case["ratios"])
        model.compression = CompressionConfig(low, high, edge_ratio=2, carry="across")
    else:
        ratio = int(case["ratio"])
        model.compression = CompressionConfig(ratio, ratio, edge_ratio=None, carry="across")
    model.prompt = replace(model.prompt, prefix_ids=tuple(case["sink_ids"].tolist()))
    return model


def _check_case(case: Case, config: dict[str, Any], weights: dict[str, Tensor]) -> Comparison:
    result = Comparison(case.name)
    model = build(config, weights, case)
    steps = Steps(model)
    prefill = model.prefill()
    features = torch.from_numpy(case["feats"]).split(case["chunks"].tolist())
    pairs = []
    for index, part in enumerate(features):
        pairs.append(prefill.append(part, last=index + 1 == len(features)))
        steps.end_chunk()
    steps.compare(result, case)
    low, high = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for kind, layer, array in _per_layer(model.prefix()):
        result.close(f"sink/{kind}/{layer}", array, case[f"sink/{kind}/{layer}"])
    if "ratios" in case:
        for level, chunks in (("L", low), ("H", high)):
            for index, chunk in enumerate(chunks):
                for kind, layer, array in _per_layer(chunk):
                    name = f"{level}/{kind}/{layer}/{index}"
                    result.close(name, array, case[name])
        for name in sorted({n.split("/")[1] for n in case.names if n.startswith("dec/")}):
            selected = set(case[f"dec/{name}/selected"].tolist())
            mixed = [low[i] if i in selected else high[i] for i in range(len(low))]
            _check_answer(result, case, model, mixed, f"dec/{name}/", "question_")
    else:
        for kind, layer, array in _per_layer(_join(low)):
            result.close(f"vst/{kind}/{layer}", array, case[f"vst/{kind}/{layer}"])
        _check_answer(result, case, model, low, "", "question/")
    return result


def _check_answer(
    result: Comparison, case: Case, model: VideoXL, chunks: list[ChunkKV], folder: str, question: str
) -> None:
    ids = torch.from_numpy(case["question_ids"])
    cache = MixedCache(model.prefix(), chunks, model.rope, room=len(ids) + 8)
    start = cache.length
    if f"{folder}cache_len" in case:
        result.same(f"{folder}cache_len", start, int(case[f"{folder}cache_len"]))
    # Logits of every question token: the same forward token by token, since the server asks for the last one only.
    logits = torch.cat([model.forward([Row(ids[i : i + 1], cache)]) for i in range(len(ids))])
    result.close(f"{folder}question_logits", logits, case[f"{folder}question_logits"])
    whole = MixedCache(model.prefix(), chunks, model.rope, room=len(ids) + 8)
    last = model.forward([Row(ids, whole)])
    result.close(f"{folder}question_logits (one pass)", last[0], case[f"{folder}question_logits"][-1])
    for kind, layer, array in _unrotated(whole, model, start, start + len(ids)):
        name = f"{folder}{question}{kind}/{layer}"
        result.close(name, array, case[name])
    if f"{folder}gen_ids" in case:
        generated, rows = [], []
        for _ in case[f"{folder}gen_ids"]:
            generated.append(int(last.argmax()))
            rows.append(last)
            last = model.forward([Row(torch.tensor(generated[-1:]), whole)])
        result.same(f"{folder}gen_ids", generated, case[f"{folder}gen_ids"].tolist())
        result.close(f"{folder}gen_logits", torch.cat(rows), case[f"{folder}gen_logits"])


def _per_layer(kv: ChunkKV) -> Iterator[tuple[str, int, Tensor]]:
    for layer in range(len(kv.keys)):
        yield "k", layer, kv.keys[layer]
        yield "v", layer, kv.values[layer]


def _join(chunks: list[ChunkKV]) -> ChunkKV:
    keys, values = torch.cat([c.keys for c in chunks], 2), torch.cat([c.values for c in chunks], 2)
    return ChunkKV(keys, values, "low", chunks[0].ratio)


def _unrotated(cache: KVCache, model: VideoXL, start: int, stop: int) -> Iterator[tuple[str, int, Tensor]]:
    """The cache's keys before RoPE: a rotation by the opposite angle."""
    cos, sin = model.rope.tables(torch.arange(start, stop), model.dtype)
    keys = model.rope.rotate(cache.keys[:, :, start:stop], cos, -sin)
    return _per_layer(ChunkKV(keys, cache.values[:, :, start:stop], "prefix", 1))


def main(arguments: list[str]) -> int:
    """Prints a line per case; see the module's docstring for the exit codes."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    status = 0
    for argument in arguments:
        results = check_file(Path(argument))
        if not results:
            print(f"{argument}: no case found")
            status = 2
        for result in results:
            verdict = "FAILED" if result.failures else "ok"
            seen = f"{result.num_arrays} arrays, largest difference {result.largest:.2e}"
            print(f"{argument}: {result.name}: {seen}: {verdict}")
            for failure in result.failures:
                print(f"  {failure}")
                status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
