"""From OpenAI messages to what the engine knows: turns of text and one video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.api.errors import bad_request, file_not_found, from_validation
from server.api.schemas import FilePart, Message, TextPart, VideoPart, VideoReference, VideoUrlPart
from server.api.unsupported import refuse_unsupported_in_message
from server.models.base import Role, Turn

_PARTS: Mapping[str, type[TextPart | FilePart | VideoUrlPart | VideoPart]] = {
    "text": TextPart,
    "file": FilePart,
    "video_url": VideoUrlPart,
    "video": VideoPart,
}


@dataclass(frozen=True, slots=True)
class VideoSource:
    """Where a message's video comes from: a stored file's id, or a URL (data:, file:, http:, https:)."""

    location: str
    filename: str
    param: str

    @property
    def is_stored(self) -> bool:
        """Whether ``location`` is a file id."""
        return self.location.startswith("file-")


@dataclass(frozen=True, slots=True)
class Conversation:
    """The text turns in their order, and the video they are about."""

    turns: tuple[Turn, ...]
    video: VideoSource | None


def parse_messages(messages: Sequence[Message]) -> Conversation:
    """Text turns and the video of a conversation. The same video may stand in several messages.

    Raises ApiError (400): unsupported content, two videos, or no question at the end.
    """
    turns: list[Turn] = []
    videos: list[VideoSource] = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        refuse_unsupported_in_message(message.model_extra, where)
        texts, found = _content(message, f"{where}.content")
        videos += found
        text = "\n".join(text for text in texts if text.strip())
        if text:
            turns.append(Turn(_role(message.role), text))
    for other in videos[1:]:
        if other.location != videos[0].location:
            raise bad_request(
                "Two different videos in one request are not supported", param=other.param, code="multiple_videos"
            )
    if not turns or turns[-1].role != "user" or messages[-1].role != "user":
        raise bad_request("The last message must be the user's and hold a text", param="messages", code="no_question")
    return Conversation(tuple(turns), videos[0] if videos else None)


def _role(role: str) -> Role:
    if role == "user":
        return "user"
    return "assistant" if role == "assistant" else "system"


def _content(message: Message, where: str) -> tuple[list[str], list[VideoSource]]:
    if message.content is None:
        raise bad_request(f"{where} is missing", param=where, code="missing_required_parameter")
    if isinstance(message.content, str):
        return [message.content], []
    texts: list[str] = []
    videos: list[VideoSource] = []
    for position, raw in enumerate(message.content):
        at = f"{where}[{position}]"
        part = _part(raw, at)
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif message.role != "user":
            raise bad_request("A video may stand in user messages only", param=at, code="unsupported_content")
        else:
            videos.append(_source(part, at))
    return texts, videos


def _part(raw: dict[str, Any], at: str) -> TextPart | FilePart | VideoUrlPart | VideoPart:
    kind = raw.get("type")
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


def _source(part: FilePart | VideoUrlPart | VideoPart, at: str) -> VideoSource:
    if isinstance(part, FilePart):
        return _from_reference(part.file, f"{at}.file")
    if isinstance(part, VideoUrlPart):
        return _from_reference(part.video_url, f"{at}.video_url")
    if isinstance(part.video, str):
        return _checked(VideoSource(part.video, "", f"{at}.video"))
    return _from_reference(part.video, f"{at}.video")


def _from_reference(reference: VideoReference, at: str) -> VideoSource:
    named = {"file_id": reference.file_id, "file_data": reference.file_data, "url": reference.url}
    given = [(name, value) for name, value in named.items() if value is not None]
    if len(given) != 1:
        raise bad_request(f"{at} needs exactly one of file_id, file_data and url", param=at)
    name, value = given[0]
    source = VideoSource(value, reference.filename or "", f"{at}.{name}")
    if name == "file_id" and not source.is_stored:
        raise file_not_found(value, param=source.param)
    if name == "file_data" and not value.startswith("data:"):
        raise bad_request(f"{source.param} must be a data: URL", param=source.param, code="invalid_data_url")
    return _checked(source)


def _checked(source: VideoSource) -> VideoSource:
    scheme = source.location.partition(":")[0].lower()
    if source.is_stored or scheme in {"data", "file", "http", "https"}:
        return source
    raise bad_request(f"{source.param} must be a file id or a data: URL", param=source.param, code="invalid_url")
