"""From OpenAI messages to what the engine knows: turns of text, and the videos and images they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.api.errors import bad_request, file_not_found, from_validation
from server.api.schemas import (
    ContentPart,
    FilePart,
    ImageUrlPart,
    Message,
    TextPart,
    VideoPart,
    VideoReference,
    VideoUrlPart,
)
from server.api.sources import Kind, Source
from server.api.unsupported import refuse_unsupported_in_message
from server.models.base import Role, Turn

_PARTS: Mapping[str, type[ContentPart]] = {
    "text": TextPart,
    "file": FilePart,
    "video_url": VideoUrlPart,
    "video": VideoPart,
    "image_url": ImageUrlPart,
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The text turns in their order, and the videos and images they are about, in theirs. No video comes twice."""

    turns: tuple[Turn, ...]
    videos: tuple[Source, ...]
    images: tuple[Source, ...]


def parse_messages(messages: Sequence[Message]) -> Conversation:
    """Text turns, videos and images of a conversation. The same video may stand in several messages.

    Raises ApiError (400): unsupported content, or no question at the end.
    """
    turns: list[Turn] = []
    videos: dict[str, Source] = {}
    images: list[Source] = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        refuse_unsupported_in_message(message.model_extra, where)
        texts, media = _content(message, f"{where}.content")
        for kind, source in media:
            if kind == "image":
                images.append(source)
            else:
                videos.setdefault(source.location, source)
        text = "\n".join(text for text in texts if text.strip())
        if text:
            turns.append(Turn(_role(message.role), text))
    if not turns or turns[-1].role != "user" or messages[-1].role != "user":
        raise bad_request("The last message must be the user's and hold a text", param="messages", code="no_question")
    return Conversation(tuple(turns), tuple(videos.values()), tuple(images))


def _role(role: str) -> Role:
    if role == "user":
        return "user"
    return "assistant" if role == "assistant" else "system"


def _content(message: Message, where: str) -> tuple[list[str], list[tuple[Kind, Source]]]:
    if message.content is None and message.role == "assistant":
        return [], []  # of an answer that was a tool's call, or that was cut off
    if message.content is None:
        raise bad_request(f"{where} is missing", param=where, code="missing_required_parameter")
    if isinstance(message.content, str):
        return [message.content], []
    texts: list[str] = []
    media: list[tuple[Kind, Source]] = []
    for position, raw in enumerate(message.content):
        at = f"{where}[{position}]"
        part = _part(raw, at)
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif message.role != "user":
            raise bad_request("Videos and images may stand in user messages only", param=at, code="unsupported_content")
        elif isinstance(part, ImageUrlPart):
            media.append(("image", _image(part, at)))
        else:
            media.append(("video", _video(part, at)))
    return texts, media


def _part(raw: dict[str, Any], at: str) -> ContentPart:
    kind = raw.get("type")
    if kind is None:
        raise bad_request(f"{at}.type is missing", param=f"{at}.type", code="missing_required_parameter")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise bad_request(
            f"{at}: content of type {str(kind)[:40]!r} is not supported ({', '.join(_PARTS)} are)",
            param=f"{at}.type",
            code="unsupported_content",
        )
    try:
        return _PARTS[kind].model_validate(raw)
    except ValidationError as error:
        raise from_validation(error, under=at) from None


def _image(part: ImageUrlPart, at: str) -> Source:
    source = Source(part.image_url.url, "", f"{at}.image_url.url")
    if not source.is_url:
        raise bad_request(f"{source.param} must be a data: URL", param=source.param, code="invalid_url")
    return source


def _video(part: FilePart | VideoUrlPart | VideoPart, at: str) -> Source:
    if isinstance(part, FilePart):
        return _from_reference(part.file, f"{at}.file")
    if isinstance(part, VideoUrlPart):
        return _from_reference(part.video_url, f"{at}.video_url")
    if isinstance(part.video, str):
        return _checked(Source(part.video, "", f"{at}.video"))
    return _from_reference(part.video, f"{at}.video")


def _from_reference(reference: VideoReference, at: str) -> Source:
    named = {"file_id": reference.file_id, "file_data": reference.file_data, "url": reference.url}
    given = [(name, value) for name, value in named.items() if value is not None]
    if len(given) != 1:
        raise bad_request(f"{at} needs exactly one of file_id, file_data and url", param=at)
    name, value = given[0]
    source = Source(value, reference.filename or "", f"{at}.{name}")
    if name == "file_id" and not source.is_stored:
        raise file_not_found(value, param=source.param)
    if name == "file_data" and not value.startswith("data:"):
        raise bad_request(f"{source.param} must be a data: URL", param=source.param, code="invalid_data_url")
    return _checked(source)


def _checked(source: Source) -> Source:
    if source.is_stored or source.is_url:
        return source
    raise bad_request(
        f"{source.param} must be a file id, or a data:, file: or http(s): URL", param=source.param, code="invalid_url"
    )
