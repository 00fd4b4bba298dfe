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
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ApiError) as refused:
        refuse_unsupported({"user": "me", name: value})
    assert (refused.value.status_code, refused.value.param) == (400, name)


@pytest.mark.parametrize("name", ["reload", "budget_tokens", "chunks", "mode", "start_s", "end_s"])
def test_a_dial_outside_x2l_is_told_where_it_belongs(name: str) -> None:
    with pytest.raises(ApiError, match=f'"x2l": {{"{name}"') as refused:
        refuse_unsupported({name: 0})
    assert (refused.value.status_code, refused.value.param) == (400, name)
