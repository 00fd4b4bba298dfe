"""Qwen's prompt format, of which the families differ in what stands around roles, turns and media."""

from __future__ import annotations


def template(opening: str = "", *, behind_media: str = "", behind_role: str = "\n", behind_turn: str = "\n") -> str:
    """The Jinja template of a conversation behind a prefix that has begun the user's turn.

    That turn goes on with ``opening``, and with ``behind_media`` where a video or an image stands before it (the
    variable ``behind_media`` tells). All that comes before the assistant speaks is one turn, a system text too.
    """
    end, start = f"<|im_end|>{behind_turn}", "<|im_start|>"
    return (
        "{%- set turn = namespace(open=true) -%}"
        f"{{{{- {opening!r} + ({behind_media!r} if behind_media else '') -}}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        f"{{{{- ({end!r} if turn.open else '') + {f'{start}assistant{behind_role}'!r} -}}}}"
        f"{{{{- message['content'] + {end!r} -}}}}"
        "{%- set turn.open = false -%}"
        "{%- else -%}"
        f"{{{{- ('' if loop.first else '\\n') if turn.open else {f'{start}user{behind_role}'!r} -}}}}"
        "{{- message['content'] -}}"
        "{%- set turn.open = true -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{{{- {end!r} if turn.open else '' -}}}}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
