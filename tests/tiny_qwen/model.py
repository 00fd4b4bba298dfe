"""A Qwen2.5-VL of transformers' own class, small enough to be trained in minutes: what it is made of and how it sees.

One frame a step (``temporal_patch_size`` 1), 12 visual tokens a frame, so 384 in a chunk of 32 seconds. It talks with
the bundled model's words and bytes, between Qwen's special tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from compression.rope import Rope
from server.models.families.patches import Patches
from server.models.tiny import tokenizer as words
from server.models.tiny.world import CHUNK_TICKS

WIDTH, HEIGHT, PATCH, MERGE = 96, 72, 12, 2
TOKENS_PER_FRAME = (WIDTH // PATCH // MERGE) * (HEIGHT // PATCH // MERGE)
AUXILIARY_LAYER = 3
"""Where training shows the model where to look (see retrieval.py)."""
SCORER_HEADS = ((AUXILIARY_LAYER, 0), (AUXILIARY_LAYER, 1))
END, SPECIALS = (
    "<|im_end|>",
    ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
BEHIND_VIDEO = "<|vision_end|>"
BEHIND_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

PATCHES = Patches(PATCH, MERGE, 1, WIDTH * HEIGHT, WIDTH * HEIGHT, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


def make_tokenizer() -> PreTrainedTokenizerFast:
    built = words.build()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=built, eos_token=END, pad_token=words.PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model() -> Qwen2_5_VLForConditionalGeneration:
    """Random weights, float32."""
    ids = make_tokenizer().convert_tokens_to_ids
    depth, hidden = 4, 256
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1040,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids(END),
            "pad_token_id": ids(words.PAD),
            # The first sixteen channels tell time, with periods from 6 s to an hour; the others hardly turn.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]},
        },
        vision_config={
            "depth": depth,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 6,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": MERGE,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": list(range(depth)),
            "tokens_per_second": 1,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        x2l={
            "frames_per_chunk": CHUNK_TICKS,
            "frame_size": [WIDTH, HEIGHT],
            "low_ratio": 2,
            "high_ratio": 16,
            "scorer_heads": [list(head) for head in SCORER_HEADS],
        },
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    initialise(model)
    model.generation_config.eos_token_id = ids(END)
    model.generation_config.pad_token_id = ids(words.PAD)
    return model


@torch.no_grad()
def initialise(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Matrices near 1/sqrt(fan-in), those at the end of a residual branch smaller, as the bundled model's."""
    depth = len(model.model.language_model.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.8 / math.sqrt(parameter[0].numel())
            if "embed_tokens" in name:
                std = 0.05
            elif name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                std /= math.sqrt(2 * depth)
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """The folder as transformers loads it, weights in float16."""
    state = {name: tensor.detach().half().cpu() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # the embedding
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=state)
    make_tokenizer().save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": MERGE,
        "min_pixels": WIDTH * HEIGHT,
        "max_pixels": WIDTH * HEIGHT,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


class Sight:
    """transformers' vision tower over many frames of the one size at once: the same sums, without its loops."""

    def __init__(self, visual: Any, device: torch.device) -> None:
        self.visual = visual
        grid = torch.meshgrid(
            torch.arange(HEIGHT // PATCH // MERGE), torch.arange(WIDTH // PATCH // MERGE),
            torch.arange(MERGE), torch.arange(MERGE), indexing="ij",
        )  # fmt: skip
        rows, columns = (MERGE * grid[0] + grid[2]).flatten(), (MERGE * grid[1] + grid[3]).flatten()
        self._rope = Rope(visual.config.hidden_size // visual.config.num_heads, 1e4)
        half = self._rope.rotary_dim // 2
        frequencies = 1.0 / 1e4 ** (torch.arange(0, half, 2) / half)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1).to(device)
        self._cos, self._sin = angles.cos(), angles.sin()

    def tokens(self, patches: Tensor) -> Tensor:
        """``patches`` [frames * 48, 432] as :meth:`Patches.flatten` makes them -> [frames, 12, hidden]."""
        visual, cells = self.visual, len(self._cos)
        x = functional.linear(patches, visual.patch_embed.proj.weight.flatten(1))
        x = x.view(-1, cells, x.shape[-1])
        cos, sin = self._cos.to(x.dtype), self._sin.to(x.dtype)
        for block in visual.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, visual.config.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = self._rope.rotate(q, cos, sin).to(v.dtype), self._rope.rotate(k, cos, sin).to(v.dtype)
            mixed = functional.scaled_dot_product_attention(q, k, v)
            x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return visual.merger(x).view(len(x), TOKENS_PER_FRAME, -1)
