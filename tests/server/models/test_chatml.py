from __future__ import annotations

import pytest
from tiny_transformers import byte_tokenizer

from server.models import llava_onevision, qwen2_5_vl, qwen3_vl

QUESTION = {"role": "user", "content": "Who?"}
TALK = [QUESTION, {"role": "assistant", "content": "Ann."}, {"role": "user", "content": "When?"}]
ORDER = {"role": "system", "content": "Be brief."}


def written(family, messages):
    """A whole prompt with a video, as text."""
    behind = byte_tokenizer().apply_chat_template(
        messages, chat_template=family._TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    return f"{family._PREFIX}VIDEO{behind}"


@pytest.mark.parametrize(
    ("family", "around"),
    [
        (
            qwen2_5_vl,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|>VIDEO<|vision_end|>",
        ),
        (qwen3_vl, "<|im_start|>user\nVIDEO"),
    ],
)
def test_qwens_conversations(family, around):
    first = f"{around}Who?<|im_end|>\n<|im_start|>assistant\n"
    assert written(family, [QUESTION]) == first
    assert written(family, TALK) == f"{first}Ann.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
    ordered = f"{around}<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    assert written(family, [ORDER, QUESTION]) == f"{ordered}<|im_start|>assistant\n"


def test_one_visions_conversations():
    """Its template breaks the line behind a video and behind an assistant's name, and nowhere else."""
    assert written(llava_onevision, [QUESTION]) == "<|im_start|>user VIDEO\nWho?<|im_end|><|im_start|>assistant\n"
