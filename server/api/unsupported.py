"""Fields that this server cannot honour: refused by name where they would change the answer.

Accepted where they ask for nothing, and so are all unknown ones: what clients send by themselves and has nothing to
act on here (``reasoning_effort``, ``verbosity``, ``chat_template_kwargs``, ``parallel_tool_calls``, ``store``,
``metadata``, ``user``, ...). The dials count as a mistake outside ``x2l``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.api.errors import bad_request
from server.api.schemas import Dials

# Field -> the values that ask for nothing. None and absence always do; every other value is refused.
_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "echo": (False,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "stop_regex": (),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "return_token_ids": (False,),
    "lora_path": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": ({},),
    "structural_tag": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
}
_MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": (),
}


def refuse_unsupported(fields: Mapping[str, Any] | None) -> None:
    """Raises a 400 that names the first request field this server cannot honour, or a dial outside ``x2l``."""
    fields = fields or {}
    for name in Dials.model_fields:
        if fields.get(name) is not None:
            raise bad_request(
                f'{name} belongs in the object x2l: {{"x2l": {{"{name}": ...}}}} (in OpenAI\'s client: extra_body)',
                param=name,
                code="unknown_parameter",
            )
    _refuse(fields, _NO_OPS, "")


def refuse_unsupported_in_message(fields: Mapping[str, Any] | None, where: str) -> None:
    """The same for one message at the path ``where``."""
    _refuse(fields or {}, _MESSAGE_NO_OPS, f"{where}.")


def _refuse(fields: Mapping[str, Any], no_ops: Mapping[str, tuple[Any, ...]], under: str) -> None:
    for name, value in fields.items():
        if value is None or name not in no_ops or any(_same(value, no_op) for no_op in no_ops[name]):
            continue
        param, passing = f"{under}{name}", " or ".join(json.dumps(no_op) for no_op in no_ops[name])
        told = f"can only be {passing} here; nothing else is supported" if passing else "is not supported"
        raise bad_request(f"{param} {told}", param=param, code="unsupported_parameter")


def _same(value: Any, no_op: Any) -> bool:
    # True == 1 in Python, and not in JSON.
    return isinstance(value, bool) == isinstance(no_op, bool) and bool(value == no_op)
