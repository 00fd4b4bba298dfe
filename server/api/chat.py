"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from compression.select import Dial
from server.api import sse
from server.api.answer import Answer, unless_disconnected
from server.api.context import Context, Services, Tenant
from server.api.errors import ApiError, bad_request, file_not_found, replies
from server.api.failures import api_error
from server.api.images import see
from server.api.inline import ingest
from server.api.messages import Conversation, parse_messages
from server.api.reply import ChatCompletion, ChatCompletionChunk, Reply, evidence
from server.api.schemas import ChatRequest
from server.api.sources import Source
from server.api.unsupported import refuse_unsupported
from server.engine.errors import FileNotFound, VideoFailed
from server.engine.request import Request, SamplingParams

router = APIRouter()

_MAX_STOPS = 4

_Videos = dict[str, Source]
"""The parts that hold a request's videos, by the ids of the files that these are, in the order of the cache."""


@router.post(
    "/v1/chat/completions",
    responses=replies(400, 404, 413, 429, 503, 507, model=ChatCompletion, events=ChatCompletionChunk.__name__),
)
async def chat(body: ChatRequest, http: HttpRequest, services: Context, tenant: Tenant) -> Response:
    """An answer, streamed or whole, as OpenAI sends it, with the evidence in ``x2l``."""
    refuse_unsupported(body.model_extra)
    require_model(services, body.model)
    conversation = parse_messages(body.messages)
    params = _sampling_params(body, services)
    dial = _dial(body, conversation)
    _limit("videos", conversation.videos, services.settings.max_videos)
    _limit("images", conversation.images, services.settings.max_images)
    images, videos = await unless_disconnected(http, _media(body, conversation, services, tenant))
    reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), body.model)
    request = Request(
        id=reply.id,
        turns=conversation.turns,
        params=params,
        file_ids=tuple(videos),
        tenant=tenant,
        dial=dial,
        images=images,
    )
    answer = Answer(services.engine, request)
    try:
        await answer.start()
        try:
            if not body.stream:
                text, final, outcome = await unless_disconnected(http, answer.collect())
                return JSONResponse(reply.completion(text, final.finish_reason or "stop", outcome))
            # An early failure is still an HTTP status; afterwards comments keep the connection alive.
            await unless_disconnected(http, answer.wait_first(services.settings.keep_alive_s))
        except BaseException:
            answer.cancel()
            raise
    except (FileNotFound, VideoFailed) as error:
        raise _refusal(error, videos) from None
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return sse.EventStream(
        _events(http, answer, reply, videos, with_usage=with_usage, keep_alive_s=services.settings.keep_alive_s),
        on_close=answer.cancel,
    )


def require_model(services: Services, name: str) -> None:
    """Raises a 404 unless ``name`` is the model that is served."""
    served = services.model_name
    if name != served:
        raise ApiError(
            404,
            f"The model {name[:80]!r} does not exist here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def _sampling_params(body: ChatRequest, services: Services) -> SamplingParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > _MAX_STOPS or not all(stop):
        raise bad_request(f"stop takes at most {_MAX_STOPS} texts, none empty", param="stop")
    asked = body.max_completion_tokens or body.max_tokens
    ceiling = services.settings.max_tokens
    default = services.spec.temperature
    return SamplingParams(
        temperature=default if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        max_tokens=None if asked is None else min(asked, ceiling),
        stop=tuple(stop),
        ignore_eos=bool(body.ignore_eos),
    )


def _dial(body: ChatRequest, conversation: Conversation) -> Dial:
    if body.x2l is None:
        return Dial()
    asked = body.x2l.model_dump(exclude_none=True)
    if asked and not conversation.videos:
        raise bad_request("x2l needs a video in the messages", param="x2l")
    for name in ("chunks", "start_s", "end_s"):
        if name in asked and len(conversation.videos) > 1:
            raise bad_request(
                f"{name} does not tell which of the {len(conversation.videos)} videos is meant: ask about one of "
                "them, or use reload, budget_tokens or mode",
                param=f"x2l.{name}",
                code="ambiguous_video",
            )
    return body.x2l.dial()


def _limit(what: str, sources: Sequence[Source], most: int) -> None:
    if len(sources) > most:
        raise bad_request(
            f"At most {most} {what} are allowed in one request, and this one has {len(sources)}",
            param=sources[most].param,
            code=f"too_many_{what}",
        )


async def _media(
    body: ChatRequest, conversation: Conversation, services: Services, tenant: str
) -> tuple[tuple[Any, ...], _Videos]:
    """The images, and the videos; those inside the request become files only if all images are good."""
    images = await see(services, conversation.images)
    return images, await _videos(body, conversation, services, tenant)


async def _videos(body: ChatRequest, conversation: Conversation, services: Services, tenant: str) -> _Videos:
    kwargs = body.media_io_kwargs.video if body.media_io_kwargs else None
    if all(video.is_stored for video in conversation.videos):
        if kwargs is not None and (kwargs.fps is not None or kwargs.num_frames is not None):
            raise bad_request(
                "media_io_kwargs applies to videos inside the request; a stored one was sampled at its upload",
                param="media_io_kwargs.video",
            )
        return {video.location: video for video in conversation.videos}
    sampling = services.sampling(
        None if kwargs is None or kwargs.fps == -1 else kwargs.fps,
        None if kwargs is None or kwargs.num_frames == -1 else kwargs.num_frames,
        fps_param="media_io_kwargs.video.fps",
        frames_param="media_io_kwargs.video.num_frames",
    )
    inline = [video for video in conversation.videos if not video.is_stored]
    taken = iter(await ingest(services, inline, sampling, tenant))
    videos: _Videos = {}
    for video in conversation.videos:  # the same bytes may have come in two ways
        videos.setdefault(video.location if video.is_stored else next(taken), video)
    return videos


def _refusal(error: Exception, videos: _Videos) -> ApiError:
    """The reply to ``error``, which names a video by its part of the request: the client may not know its file."""
    if not isinstance(error, FileNotFound | VideoFailed):
        return api_error(error)
    video = videos[error.file_id]
    if isinstance(error, VideoFailed):
        told = str(error) if video.is_stored else f"The video cannot be used: {error.status_details}"
        return bad_request(told, param=video.param, code="video_failed")
    if video.is_stored:
        return file_not_found(error.file_id, param=video.param)
    return ApiError(404, "The video was removed from the server", param=video.param, code="file_not_found")


async def _events(
    http: HttpRequest, answer: Answer, reply: Reply, videos: _Videos, *, with_usage: bool, keep_alive_s: float
) -> AsyncIterator[bytes]:
    def event(chunk: ChatCompletionChunk) -> bytes:
        if with_usage:
            chunk.setdefault("usage", None)
        return sse.event(chunk)

    yield event(reply.chunk({"role": "assistant", "content": ""}))
    try:
        async for delta in answer.deltas(keep_alive_s):
            if delta is None:
                yield sse.COMMENT
                continue
            if delta.text:
                yield event(reply.chunk({"content": delta.text}))
            if delta.outcome is not None:
                last = reply.chunk({}, delta.finish_reason)
                if delta.outcome.files:
                    last["x2l"] = evidence(delta.outcome)
                yield event(last)
                if with_usage:
                    yield event(reply.last(delta.outcome))
    except Exception as error:  # the status is long sent: whatever it is, the client gets to know it here
        refusal = _refusal(error, videos)
        http.state.failed_status = refusal.status_code
        yield sse.event(refusal.body())
        return
    yield sse.DONE
