from __future__ import annotations

from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.unsupported import refuse_unsupported


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0},
        {"tools": [], "tool_choice": "auto", "logit_bias": {}, "response_format": {"type": "text"}},
        {"n": None, "tools": None, "audio": None, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {"reasoning_effort": "high", "verbosity": "low", "parallel_tool_calls": True, "safety_identifier": "s"},
        {"chat_template_kwargs": {"enable_thinking": False}, "mm_processor_kwargs": {}},
        {"continue_final_message": False, "add_generation_prompt": True, "skip_special_tokens": True, "bad_words": []},
        {"length_penalty": 1.0, "return_token_ids": False, "logits_processors": [], "regex": None},
        {"reload": None, "relaod": 3},
    ],
)
def test_what_asks_for_nothing_passes(fields: dict[str, Any]) -> None:
    refuse_unsupported(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("logprobs", 0),
        ("presence_penalty", 0.5),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"5": 1}),
        ("min_p", 0.1),
        ("regex", "a+"),
        ("ebnf", 'root ::= "a"'),
        ("json_schema", "{}"),
        ("allowed_token_ids", [1]),
        ("bad_words", ["no"]),
        ("length_penalty", 0.5),
        ("truncate_prompt_tokens", 10),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("logits_processors", ["a.B"]),
        ("lora_path", "a"),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("return_token_ids", True),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ApiError) as refused:
        refuse_unsupported({"user": "me", name: value})
    assert (refused.value.status_code, refused.value.param) == (400, name)


def test_what_would_pass_is_told() -> None:
    for name, value, told in (
        ("n", 0, "n can only be 1"),
        ("tool_choice", "required", 'tool_choice can only be "none" or "auto"'),
        ("regex", "a+", "regex is not supported"),
    ):
        with pytest.raises(ApiError, match=told):
            refuse_unsupported({name: value})


@pytest.mark.parametrize("name", ["reload", "budget_tokens", "chunks", "mode", "start_s", "end_s"])
def test_a_dial_outside_x2l_is_told_where_it_belongs(name: str) -> None:
    with pytest.raises(ApiError, match=f'"x2l": {{"{name}"') as refused:
        refuse_unsupported({name: 0})
    assert (refused.value.status_code, refused.value.param) == (400, name)
