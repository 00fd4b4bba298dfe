"""Questions through HTTP, with the stock OpenAI client: to this server, or to any other that takes ``video_url``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai

from compression.score import Scorer
from compression.select import Dial
from server.bench.reply import MAX_TOKENS, OWN, PHASES, Reply
from server.bench.video import ServerUnusable, VideoRefused
from server.client import sendable_key, server_root

_CONCURRENCY = 8
_TIMEOUT_S = 600.0
_POLL_S = 0.1


class RemoteBench:
    """A server. ``has_dials`` tells whether it is one of ours: only those can be told how much to re-load."""

    def __init__(self, base_url: str, *, api_key: str = "", model: str | None = None) -> None:
        """``model`` None takes the first that the server lists. Raises ServerUnusable, and ServerError
        for an address or a key that cannot be one."""
        root, key = server_root(base_url), sendable_key(api_key)
        # It tries nothing again: a refusal is a finding.
        self.client = openai.OpenAI(base_url=f"{root}/v1", api_key=key or "none", max_retries=0, timeout=_TIMEOUT_S)
        try:
            served = {one.id: one for one in self.client.models.list()}
        except openai.OpenAIError as error:
            raise ServerUnusable(f"cannot use the server at {root}: {describe(error)}") from None
        if model not in (None, *served) or not served:
            raise ServerUnusable(f"the server at {root} serves {', '.join(served) or 'no model'}, not {model}")
        self.model = model or next(iter(served))
        self.has_dials = served[self.model].owned_by == OWN

    def __enter__(self) -> RemoteBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    @contextmanager
    def open(self, path: Path) -> Iterator[RemoteVideo]:
        """Uploads the video and waits for its prefill; it is deleted in the end. A server without dials gets the video
        with every question instead. Raises VideoRefused."""
        if not self.has_dials:
            data = base64.b64encode(path.read_bytes()).decode()
            url = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
            yield RemoteVideo(self.client, self.model, url)
            return
        client = self.client
        try:
            file = client.files.create(file=path, purpose="user_data")
        except openai.OpenAIError as error:
            raise VideoRefused(describe(error)) from None
        try:
            try:
                file = client.files.wait_for_processing(file.id, poll_interval=_POLL_S, max_wait_seconds=24 * 3600.0)
                likely = client.post(f"/files/{file.id}/relevance", body={"question": "?"}, cast_to=dict[str, Any])
            except (openai.OpenAIError, RuntimeError) as error:
                raise VideoRefused(getattr(file, "status_details", None) or describe(error)) from None
            part = {"type": "file", "file": {"file_id": file.id}}
            yield RemoteVideo(client, self.model, part, (file.model_extra or {})["video"], len(likely["selection"]))
        finally:
            with suppress(openai.OpenAIError):
                client.files.delete(file.id)


class RemoteVideo:
    """A video at a server. ``part`` is the message's content part that names or holds it."""

    def __init__(
        self,
        client: openai.OpenAI,
        model: str,
        part: Mapping[str, Any],
        status: Mapping[str, Any] | None = None,
        default_reload: int = 0,
    ) -> None:
        """``status`` is the extension field ``video`` of the file."""
        self.num_chunks: int = status["num_chunks"] if status else 0
        self.default_reload = default_reload
        self.prefill_s: float = status["prefill_s"] if status else 0.0
        self._client, self._model, self._part = client, model, part
        self._token_nbytes = status["bytes"]["low"] / max(1, status["tokens"]["low"]) if status else 0.0

    def ask(self, asked: Sequence[tuple[str, Dial]], scorer: Scorer | None = None) -> list[Reply]:
        """See :meth:`server.bench.video.AskedVideo.ask`; the scorer is the server's own."""
        if scorer is not None:
            raise ValueError("a server scores in its own way")
        return in_parallel(lambda one: self._ask(*one), asked)

    def _ask(self, text: str, dial: Dial) -> Reply:
        dials = {name: value for name, value in asdict(dial).items() if value is not None}
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": [self._part, {"type": "text", "text": text}]}],  # type: ignore
                max_tokens=MAX_TOKENS,
                temperature=0.0,
                extra_body={"x2l": dials} if dials else None,
            )
        except openai.OpenAIError as error:
            return Reply(error=describe(error))
        if not completion.choices:
            return Reply(error="the reply has no choices")
        x2l = (completion.model_extra or {}).get("x2l")
        text = completion.choices[0].message.content or ""
        return Reply(text) if x2l is None else self._reply(text, x2l)

    def _reply(self, text: str, x2l: Mapping[str, Any]) -> Reply:
        kv_tokens = x2l["kv_tokens"]["mixed"]
        return Reply(
            text=text,
            error="degraded: an L-KV could not be read" if x2l["degraded"] else None,
            kv_tokens=kv_tokens,
            kv_nbytes=round(kv_tokens * self._token_nbytes),
            reload_nbytes=x2l["reload_bytes"],
            reloaded=tuple(one["chunk"] for one in x2l["evidence"]),
            spans_s=tuple((one["start_s"], one["end_s"]) for one in x2l["evidence"]),
            scores=tuple(x2l["scores"]),
            times_ms={phase: x2l["timings_ms"][phase] for phase in PHASES},
        )


def in_parallel(ask: Callable[[Any], Reply], jobs: Sequence[Any], concurrency: int = _CONCURRENCY) -> list[Reply]:
    """The replies in the jobs' order, ``concurrency`` at a time."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, jobs))


def describe(error: Exception) -> str:
    """One line: the kind of error, and what the server or the network said."""
    message = getattr(error, "message", None) or str(error)
    cause = error.__cause__
    return f"{type(error).__name__}: {message}{f' ({cause})' if cause is not None else ''}"
