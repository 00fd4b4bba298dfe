"""The JSON that clients send and get. Unknown fields pass, except in our own ``x2l`` object."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from compression.select import Dial

_SURROGATE = re.compile("[\ud800-\udfff]")


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True)

    @field_validator("*")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        """JSON can hold half of a character (a lone surrogate), and nothing behind here can."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                raise PydanticCustomError("string_unicode", "a lone surrogate")  # as pydantic does of some fields
        return value


class _Open(_Asked):
    model_config = ConfigDict(extra="allow")


class _Closed(_Asked):
    model_config = ConfigDict(extra="forbid")


class Message(_Open):
    """One message; content parts are checked one by one in messages.py."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None


class TextPart(_Open):
    """Text."""

    type: Literal["text"]
    text: str


class VideoReference(_Open):
    """A video: a stored file's id, its bytes as a data: URL, or a URL. Exactly one of the three."""

    file_id: str | None = None
    file_data: str | None = None
    url: str | None = None
    filename: str | None = None


class FilePart(_Open):
    """OpenAI's file part."""

    type: Literal["file"]
    file: VideoReference


class VideoUrlPart(_Open):
    """vLLM's video part."""

    type: Literal["video_url"]
    video_url: VideoReference


class VideoPart(_Open):
    """A video by id, by URL or by reference."""

    type: Literal["video"]
    video: str | VideoReference


class ImageUrl(_Open):
    """An image: its bytes as a data: URL, or a URL. There is one resolution, so ``detail`` changes nothing."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImageUrlPart(_Open):
    """OpenAI's image part."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = TextPart | FilePart | VideoUrlPart | VideoPart | ImageUrlPart


class Dials(_Closed):
    """The request's ``x2l`` object: how much to re-load.

    With several videos ``reload`` and ``budget_tokens`` are shared by all of them, and ``chunks``, ``start_s`` and
    ``end_s``, which would not tell whose they are, are refused.
    """

    reload: int | None = Field(None, ge=0, description="Number of chunks to re-load in detail.")
    budget_tokens: int | None = Field(
        None, ge=1, description="Bound of the whole mixed cache in KV tokens, prefix included."
    )
    chunks: list[int] | None = Field(None, description="Exactly these chunks.")
    mode: Literal["auto", "low", "high"] | None = Field(None, description="low: all chunks in detail; high: none.")
    start_s: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Only chunks that end after it are candidates."
    )
    end_s: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Only chunks that begin before it are candidates."
    )

    def dial(self) -> Dial:
        """The same as the engine takes it."""
        asked = self.model_dump(exclude_none=True)
        return Dial(**asked | ({"chunks": tuple(asked["chunks"])} if "chunks" in asked else {}))

    @model_validator(mode="after")
    def _one_dial(self) -> Dials:
        names = [name for name in ("reload", "budget_tokens", "chunks", "mode") if getattr(self, name) is not None]
        if len(names) > 1:
            raise ValueError(f"At most one of reload, budget_tokens, chunks and mode; got {' and '.join(names)}")
        return self


class VideoKwargs(_Open):
    """Sampling of an inline video (vLLM's words); -1 is the server's default."""

    num_frames: int | None = Field(None, ge=-1)
    fps: float | None = Field(None, ge=-1, allow_inf_nan=False)


class MediaKwargs(_Open):
    """vLLM's ``media_io_kwargs``."""

    video: VideoKwargs | None = None


class StreamOptions(_Open):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None


class ChatRequest(_Open):
    """``POST /v1/chat/completions``."""

    model: str = Field(description="The model's id, as GET /v1/models tells it.")
    messages: list[Message] = Field(
        min_length=1, description="The conversation with its videos and images; the last message is the user's."
    )
    stream: bool | None = Field(None, description="Whether the answer comes as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="include_usage: a last chunk with the usage.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; the server's --max-tokens is a ceiling.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens, goes first.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="0 is greedy. By default the model's own, which is 0 with the bundled model.",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="Draw from the likeliest tokens of this share; 1: from all."
    )
    top_k: int | None = Field(None, ge=-1, description="Draw from so many likeliest tokens; 0 and -1: from all.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Makes draws repeatable.")
    stop: str | list[str] | None = Field(None, description="Up to four texts that end the answer, and are not in it.")
    ignore_eos: bool | None = Field(None, description="Only max_tokens and stop end the answer; for measurements.")
    x2l: Dials | None = Field(None, description="How much of the videos to re-load in detail.")
    media_io_kwargs: MediaKwargs | None = Field(
        None, description="Sampling of videos inside the messages (video.fps, video.num_frames)."
    )


class RelevanceRequest(_Closed):
    """``POST /v1/files/{id}/relevance``."""

    question: str
    x2l: Dials | None = Field(None, description="What the selection is made with, as in a chat request.")


class ExpiresAfter(_Open):
    """OpenAI's ``expires_after``: seconds after the file was made."""

    anchor: Literal["created_at"]
    seconds: int


class CreateUpload(_Open):
    """``POST /v1/uploads``; ``fps``, ``max_frames`` and ``pinned`` are ours."""

    filename: str = Field(min_length=1, max_length=1000)
    purpose: str
    bytes: int = Field(ge=1)
    mime_type: str
    expires_after: ExpiresAfter | None = None
    fps: float | None = Field(None, allow_inf_nan=False)
    max_frames: int | None = None
    pinned: bool = False


class CompleteUpload(_Open):
    """``POST /v1/uploads/{id}/complete``; ``md5`` in hex."""

    part_ids: list[str] = Field(min_length=1)
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$")


class UpdateFile(_Closed):
    """``POST /v1/files/{id}``."""

    pinned: bool


class ErrorDetails(BaseModel):
    """What is wrong: in words, by OpenAI's type, the field of the request that is to blame, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error, the body of every refusal."""

    error: ErrorDetails


class Levels(BaseModel):
    """One number for each compression level."""

    low: int
    high: int


class Tokens(Levels):
    """Visual tokens and KV tokens, without the prefix."""

    visual: int


class Video(BaseModel):
    """The extension field ``video`` of a file."""

    duration_s: float
    width: int
    height: int
    num_frames: int
    num_chunks: int
    chunks_done: int
    progress: float
    tokens: Tokens
    bytes: Levels
    prefill_s: float | None
    prefill_mode: str | None


class FileObject(BaseModel):
    """OpenAI's file with the extension fields ``pinned`` and ``video``."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    pinned: bool
    video: Video | None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """The reply to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadObject(BaseModel):
    """OpenAI's upload."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None


class UploadPartObject(BaseModel):
    """OpenAI's part of an upload with the extension field ``bytes``."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    upload_id: str
    created_at: int
    bytes: int


class UploadState(UploadObject):
    """An upload with the parts that have arrived, in that order."""

    parts: list[UploadPartObject]


class ChunkObject(BaseModel):
    """One chunk of a video."""

    index: int
    start_s: float
    end_s: float
    num_frames: int
    tokens: Levels
    resident: bool


class Relevance(BaseModel):
    """One score per chunk, and the chunks that a question with these dials would re-load, best first."""

    file_id: str
    scores: list[float]
    selection: list[int]


class ModelObject(BaseModel):
    """OpenAI's model with vLLM's ``max_model_len``: its positions, for videos, prompt and answer together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "x2l"
    max_model_len: int


class ModelList(BaseModel):
    """All models: the one that is served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
