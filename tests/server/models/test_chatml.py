from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_transformers import byte_tokenizer

from server.models.families import llava_onevision, qwen2_5_vl, qwen3_vl
from server.models.videoxl import pretrained

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
QUESTION = {"role": "user", "content": "Who?"}
TALK = [QUESTION, {"role": "assistant", "content": "Ann."}, {"role": "user", "content": "When?"}]
ORDER = {"role": "system", "content": "Be brief."}
VIDEO_XL = SimpleNamespace(_PREFIX=pretrained.PREFIX, _TEMPLATE=pretrained.CHAT_TEMPLATE)


def written(family, messages, media="MEDIA"):
    """A whole prompt, as text; ``media`` bring what stands around them."""
    behind = byte_tokenizer().apply_chat_template(
        messages,
        chat_template=family._TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
        behind_media=bool(media),
    )
    return f"{family._PREFIX}{media}{behind}"


@pytest.mark.parametrize(
    ("family", "before", "between"),
    [(qwen2_5_vl, SYSTEM, ""), (qwen3_vl, "<|im_start|>user\n", ""), (VIDEO_XL, SYSTEM, "\n")],
    ids=["qwen2_5_vl", "qwen3_vl", "videoxl"],
)
def test_conversations(family, before, between):
    first = f"{before}MEDIA{between}Who?<|im_end|>\n<|im_start|>assistant\n"
    assert written(family, [QUESTION]) == first
    assert written(family, TALK) == f"{first}Ann.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
    assert written(family, [ORDER, QUESTION]) == first.replace("Who?", "Be brief.\nWho?")
    for talk in (TALK, [ORDER, QUESTION]):
        plain = written(family, talk, "")
        assert plain == written(family, talk).replace(f"MEDIA{between}", ""), "nothing is left of what is not there"


def test_one_visions_conversations():
    """Its template breaks the line before every text, and nowhere else."""
    first = "<|im_start|>user MEDIA\nWho?<|im_end|><|im_start|>assistant"
    assert written(llava_onevision, [QUESTION]) == f"{first}\n"
    assert written(llava_onevision, TALK) == (
        f"{first} \nAnn.<|im_end|><|im_start|>user \nWhen?<|im_end|><|im_start|>assistant\n"
    )
    assert written(llava_onevision, [QUESTION], "") == f"{first}\n".replace("MEDIA", "")
