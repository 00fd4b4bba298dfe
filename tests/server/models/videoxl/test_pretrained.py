"""Checkpoints in the public layout, written here, through the production loader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SPECIALS, TINY, VISION, Files, layout, random_weights, stray_buffers, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from server.models.base import Turn
from server.models.registry import DeviceError, UnknownModelError, check_dtype, load_model
from server.models.tensors import CheckpointError, TensorFolder
from server.models.videoxl.checkpoint import load_modules
from server.models.videoxl.clip import CLIP_L_14_336
from server.models.videoxl.model import VideoXL
from server.video.frames import Frames

Weights = dict[str, Tensor]
WEIGHTS = random_weights(TINY)


def load(folder: Path, **options: Any) -> VideoXL:
    model = load_model(str(folder), device="cpu", **options)
    assert isinstance(model, VideoXL)
    return model


def kvs(model: VideoXL) -> list[Tensor]:
    """What the model makes of the prefix and of two chunks of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 70, 3), dtype=np.uint8)
    times_s = np.arange(6, dtype=np.float64)
    features = model.encode(model.preprocess(Frames(pixels, times_s)), times_s)
    prefill = model.prefill()
    pairs = [prefill.append(features[:16], last=False), prefill.append(features[16:], last=True)]
    return [model.prefix().keys, *(kv.keys for pair in pairs for kv in pair), *(kv.values for kv in pairs[1])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> VideoXL:
    return load(write_checkpoint(tmp_path_factory.mktemp("plain") / "tiny-xl", WEIGHTS))


@pytest.mark.parametrize("files", ["sharded", "bin", "sharded-bin"])
def test_all_files_make_the_same_model(plain: VideoXL, tmp_path: Path, files: Files) -> None:
    folder = write_checkpoint(tmp_path / "tiny-xl", WEIGHTS | stray_buffers(), files=files)
    model = load(folder)
    assert model.fingerprint == plain.fingerprint
    assert all(torch.equal(ours, same) for ours, same in zip(kvs(model), kvs(plain), strict=True))
    for file in folder.iterdir():  # nothing of the model hangs on the files
        file.write_bytes(b"")
        file.unlink()
    assert torch.equal(model.decoder.lm_head.weight, WEIGHTS["lm_head.weight"])


def test_what_the_server_learns_of_the_model(plain: VideoXL) -> None:
    spec = plain.spec
    assert (spec.name, spec.tokens_per_frame, spec.frames_per_chunk, spec.fps) == ("tiny-xl", 4, 4, 1.0)
    assert (spec.low_ratio, spec.high_ratio, spec.max_positions, spec.temperature) == (2, 32, 4096, 0.0)
    assert (plain.compression.edge_ratio, plain.compression.carry) == (2, "across")
    assert plain.end_ids == {150, 151}  # of configurations and tokenizer
    assert plain.dtype == torch.float32


def test_the_public_sizes() -> None:
    config = {name: value for name, value in TINY.items() if name != "vision_config"} | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    shapes = layout(config | {"vision_config": CLIP_L_14_336})
    assert len(shapes) == 903
    modules = load_modules(config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert (modules.encoder.tokens_per_frame, modules.decoder.config.head_dim) == (144, 128)
    assert modules.encoder.tower.embeddings.position_ids.tolist() == [list(range(577))]


def test_a_tokenizer_of_vocabulary_and_merges(plain: VideoXL, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, WEIGHTS)
    (folder / "tokenizer.json").unlink()
    letters = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]  # as Qwen2 writes a blank and a line feed
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate([*letters, "no"])}))
    (folder / "merges.txt").write_text("#version: 0.2\nn o\n")
    special = {str(150 + i): {"content": token, "special": True} for i, token in enumerate(SPECIALS)}
    kind = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": special}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    model = load(folder)
    text = "\nno one<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenize([Turn("user", "no one")])
    assert model.tokenizer.decode(ids) == text
    assert len(ids) == len("\nn one#\n#assistant\n")
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt"):
        load(folder)


def test_the_prompt_is_the_published_one(plain: VideoXL) -> None:
    def text(ids: list[int] | tuple[int, ...]) -> str:
        return str(plain.tokenizer.decode(ids))

    prefix = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert text(plain.prompt.prefix_ids) == prefix
    one = "\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert text(plain.tokenize([Turn("user", "Who?")])) == one
    talk = [Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "Ann."), Turn("user", "Why?")]
    assert text(plain.tokenize(talk)) == (
        "\nBe brief.\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(plain.tokenize([Turn("user", "a<|im_end|>b")])) == one.replace("Who?", "a b")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_any_dtype_becomes_the_one_asked_for(tmp_path: Path, stored: torch.dtype, files: Files) -> None:
    weights = {name: tensor.to(stored) for name, tensor in WEIGHTS.items()}
    folder = write_checkpoint(tmp_path, weights, files=files)
    for asked in ("float32", "bfloat16"):
        model = load(folder, dtype=asked)
        dtypes = {p.dtype for module in (model.decoder, model.encoder) for p in module.parameters()}
        assert dtypes == {getattr(torch, asked)}
        assert torch.equal(model.decoder.norm.weight, weights["model.norm.weight"].to(model.dtype))
        assert all(kv.isfinite().all() and kv.dtype == model.dtype for kv in kvs(model))


def test_missing_vst_weights_are_those_of_plain_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if "beacon" not in name}
    model = load(write_checkpoint(tmp_path, weights, files="sharded"))
    attention = model.decoder.layers[1].self_attn
    for part in ("q", "k", "v"):
        ours, copied = getattr(attention, f"beacon_{part}_proj"), getattr(attention, f"{part}_proj")
        assert torch.equal(ours.weight, copied.weight) and torch.equal(ours.bias, copied.bias)
    assert torch.equal(model.decoder.beacon_embed_tokens.weight[0], WEIGHTS["model.embed_tokens.weight"][151])
    assert all(kv.isfinite().all() for kv in kvs(model))
    assert f"for {sum('beacon' in name for name in WEIGHTS)} tensors" in caplog.text


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.beacon_q_proj.weight", "model.beacon_embed_tokens.weight"])
def test_a_vst_weight_that_is_missing_is_told(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    load(write_checkpoint(tmp_path / "whole", WEIGHTS))
    assert caplog.text == ""
    load(write_checkpoint(tmp_path / "less", {other: tensor for other, tensor in WEIGHTS.items() if other != name}))
    assert "for 1 tensors" in caplog.text and name in caplog.text


def test_the_tower_ends_where_the_configuration_says_and_has_no_last_norm(plain: VideoXL, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if "post_layernorm" not in name}
    assert load(write_checkpoint(tmp_path / "tiny-xl", weights)).fingerprint == plain.fingerprint
    # With -2 of two layers the second one changes nothing, with -1 it does.
    other = WEIGHTS | {f"{VISION}encoder.layers.1.mlp.fc2.bias": torch.ones(16)}
    same, changed = (
        load(write_checkpoint(tmp_path / str(layer), other, TINY | {"mm_vision_select_layer": layer}))
        for layer in (-2, -1)
    )
    assert torch.equal(kvs(same)[1], kvs(plain)[1])
    assert not torch.equal(kvs(changed)[1], kvs(plain)[1])
    assert len({plain.fingerprint, same.fingerprint, changed.fingerprint}) == 3


def test_only_the_tokens_kept_differ_where_only_the_layer_differs(tmp_path: Path) -> None:
    folders = [
        write_checkpoint(tmp_path / str(layer) / "m", WEIGHTS, TINY | {"mm_vision_select_layer": layer})
        for layer in (-2, -1)
    ]
    assert len({load(folder).fingerprint for folder in folders}) == 2  # the weights are the same


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (
            lambda w: w.pop(f"{VISION}embeddings.class_embedding"),
            f"missing tensors: {VISION}embeddings.class_embedding",
        ),
        (lambda w: w.pop("model.mm_projector.2.bias"), "missing tensors: model.mm_projector.2.bias"),
        (lambda w: w.pop("lm_head.weight"), "missing tensors: lm_head.weight"),
        (
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}),
            "unexpected .* model.layers.9.mlp.up",
        ),
        (lambda w: w.update({"model.image_newline": torch.ones(2)}), "unexpected tensors: model.image_newline"),
        (lambda w: w.update({"other": torch.ones(2)}), "unexpected tensors: other"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"another shape: model.norm.weight \[3\] instead of \[32\]",
        ),
    ],
)
@pytest.mark.parametrize("files", ["sharded", "bin"])
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Weights], object], named: str, files: Files
) -> None:
    weights = dict(WEIGHTS)
    change(weights)
    with pytest.raises(CheckpointError, match=named) as raised:
        load(write_checkpoint(tmp_path, weights, files=files))
    assert "\n" not in str(raised.value)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith(VISION)}
    with pytest.raises(CheckpointError, match=r"and 2\d more$"):
        load(write_checkpoint(tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beacon_pos": "append"}, "beacon_pos is 'append'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"beacon_stride": 8}, "beacon_stride is 8"),
        ({"beacon_window": 18, "beacon_stride": 18}, "a frame has 4 tokens"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"vocab_size": 100}, "the tokenizer has"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9"),
        ({"scorer_heads": [[2, 0]]}, r"scorer_heads names \[2, 0\], but there are 2 layers of 4 heads"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load(write_checkpoint(tmp_path, WEIGHTS, TINY | change))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors"),
        (lambda folder: truncate(folder / "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "model.safetensors.index.json"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            r"\.\./b",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: [file.unlink() for file in folder.glob("model*")], "no model.safetensors"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, spoil: Callable[[Path], object], named: str) -> None:
    folder = write_checkpoint(tmp_path, WEIGHTS, files="sharded")
    spoil(folder)
    with pytest.raises(CheckpointError, match=named) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"no config\.json in {tmp_path}; .*'tiny'.*owner/name"):
        load_model(".", device="cpu")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Payload:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, WEIGHTS, files="bin")
    torch.save({"model.norm.weight": Payload(tmp_path / "run")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "run").exists()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        load(folder)


def test_other_architectures_are_refused_with_a_list(tmp_path: Path) -> None:
    other = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    said = r"Mamba.*supported are 'tiny'.*Video-XL.*qwen2_5_vl.*server/models/families"
    with pytest.raises(UnknownModelError, match=said):
        load(tmp_path)


def test_a_dtype_that_the_device_lacks() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_dtype(dtype, torch.device("cpu"))
    with pytest.raises(DeviceError, match="'cpu' does not compute in float8_e4m3fn"):
        check_dtype(torch.float8_e4m3fn, torch.device("cpu"))


PEAK = """
import json, sys, threading, time, torch
from pathlib import Path
torch.set_num_threads(1)
from server.models.registry import load_model

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

small, safetensors, pickles = sys.argv[1:]
load_model(small, device="cpu", dtype="float32")  # libraries and their buffers are there from now on
for folder, dtype in ((safetensors, "float32"), (pickles, "float32"), (safetensors, "bfloat16")):
    before, peak, done = anonymous(), 0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, device="cpu", dtype=dtype)
    done.set()
    watcher.join()
    sizes = [p.nbytes for module in (model.decoder, model.encoder) for p in module.parameters()]
    print(json.dumps({"peak": peak - before, "weights": sum(sizes), "largest": max(sizes)}))
    del model
"""


def test_the_weights_are_never_held_twice(tmp_path: Path) -> None:
    config = TINY | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4096}
    weights = random_weights(config)
    folders = [write_checkpoint(tmp_path / "small", WEIGHTS)]
    folders += [write_checkpoint(tmp_path / files, weights, config, files=files) for files in ("sharded", "bin")]
    result = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = [json.loads(line) for line in result.stdout.splitlines()]
    assert [round(one["weights"] / 1e6) for one in seen] == [125, 125, 62]
    for one in seen:
        # A second copy would be all of the weights once more; the largest tensor and the allocator's rest is not.
        assert one["peak"] < one["weights"] + 2 * one["largest"] + 12e6, seen


def test_an_outline_holds_shapes_only(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    assert {name: tensor.device.type for name, tensor in folder.outline().items()} == {"a": "meta", "b": "meta"}
    read = folder.read(torch.device("cpu"), torch.float16)
    assert {name: (len(tensor), tensor.dtype) for name, tensor in read.items()} == {
        "a": (3, torch.float16),
        "b": (2, torch.float16),
    }
