"""Qwen's prompt format, of which the families differ in what stands around a video."""

from __future__ import annotations


def template(opening: str = "", *, break_after_role: str = "\n", break_after_turn: str = "\n") -> str:
    """The Jinja template of a conversation behind a video. The video stands at the beginning of a user's turn, which
    the first message goes on, behind ``opening``; one that is not the user's ends that turn first."""
    end, start = f"<|im_end|>{break_after_turn}", "<|im_start|>"
    return (
        f"{{{{- {opening!r} -}}}}"
        "{%- for message in messages -%}"
        "{%- if not (loop.first and message['role'] == 'user') -%}"
        f"{{{{- ({end!r} if loop.first else '') + {start!r} + message['role'] + {break_after_role!r} -}}}}"
        "{%- endif -%}"
        f"{{{{- message['content'] + {end!r} -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}"
    )
