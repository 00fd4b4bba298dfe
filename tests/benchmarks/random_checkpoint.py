"""Checkpoints of full-size models with random bfloat16 weights, as fast as the device and the disk allow."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

sys.path.append(str(Path(__file__).resolve().parents[1]))

from checkpoints import TINY, layout

from server.models.videoxl.clip import CLIP_L_14_336

FAMILIES = ("videoxl", "qwen2_5_vl")
VOCAB_SIZE, NUM_TEXT_TOKENS, NUM_LEARNT = 152_064, 151_643, 4096
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PREPROCESSING = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12_845_056,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}
"""As published with Qwen2.5-VL."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Gives the same prompts as Qwen2.5-VL's own. The server here has its own; other software takes the folder's."""
STD = 0.02
SHARD_NBYTES = 2 << 30
NUM_WRITERS = 8


def write_checkpoint(family: str, folder: Path, num_layers: int | None = None) -> None:
    """A folder as users find it: sharded safetensors, configuration, tokenizer. The sizes are those of the published 7B
    models, but for ``num_layers`` of the language model. The weights are drawn from a fixed seed, on a GPU if there is
    one: small enough for what they compute to stay finite."""
    folder.mkdir(parents=True)
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    write = {"videoxl": _write_videoxl, "qwen2_5_vl": _write_qwen2_5_vl}[family]
    shapes = write(folder, num_layers or 28, ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_end|>"]]}))
    write_tensors(folder, shapes, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Questions take about as many tokens as with a published tokenizer; and there is a word for every other id, so
    that random answers can be read too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = (Path(__file__).parents[2] / "README.md").read_text()
    trainer = trainers.BpeTrainer(vocab_size=NUM_LEARNT, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab = learnt["vocab"] | {f"Ġw{index}": index for index in range(len(learnt["vocab"]), NUM_TEXT_TOKENS)}
    tokenizer.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def write_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
    """Random tensors of these shapes, as shards with their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    nbytes = 0
    for name, shape in shapes.items():
        if nbytes >= SHARD_NBYTES:
            shards.append({})
            nbytes = 0
        shards[-1][name] = shape
        nbytes += 2 * math.prod(shape)
    files = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    seeds = {name: seed for seed, name in enumerate(shapes)}
    with ThreadPoolExecutor(NUM_WRITERS) as writers:
        for written in [
            writers.submit(_write_shard, folder / file, shard, seeds, device)
            for file, shard in zip(files, shards, strict=True)
        ]:
            written.result()
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], seeds: Mapping[str, int], device: torch.device
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            if len(shape) == 1 and name.endswith("weight"):  # of a norm
                weight.fill_(1)
            else:
                weight.normal_(0, STD, generator=torch.Generator(device).manual_seed(seeds[name]))
            if name == "lm_head.weight":  # every token of an answer is a word: what a client waits for always comes
                weight[:NUM_LEARNT] = weight[NUM_TEXT_TOKENS:] = 0
            file.write(weight.cpu().view(torch.uint8).numpy().data)


def _write_videoxl(folder: Path, num_layers: int, ids: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    config = TINY | {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "beacon_window": 1440,
        "beacon_stride": 1440,
        "eos_token_id": ids["<|im_end|>"],
        "vision_config": CLIP_L_14_336,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layout(config)


def _write_qwen2_5_vl(folder: Path, num_layers: int, ids: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return {_published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _published(name: str) -> str:
    """A tensor's name in transformers 5 -> in the published checkpoints."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
