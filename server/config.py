"""The settings of a server: command line options, ``X2L_<NAME>`` variables, defaults; frozen once read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "X2L_"
CLIENT_VARIABLES = frozenset({"X2L_BASE_URL"})  # X2L_API_KEY serves both sides

Names = Annotated[tuple[str, ...], NoDecode]

_HOST = re.compile(r"\w[\w.-]*|[0-9a-fA-F:]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*")
"""A name, an IPv4 address, or an IPv6 address."""


class SettingsError(ValueError):
    """A setting that is unknown or has a bad value; the message is one line for the user."""


def _default_store() -> str:
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"disk:{Path(data) / 'x2l'}"


class Settings(BaseSettings):
    """Everything that can be set. Sizes are bytes and take units ("20GB", "64MiB"); lists are comma-separated."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model: str = Field("tiny", description="'tiny' (bundled), a model id or a path.")
    served_model_name: str | None = Field(None, min_length=1, description="What clients call the model.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Precision of the model.")
    low_ratio: int | None = Field(None, ge=1, description="Ratio of the detailed KVs instead of the model's.")
    high_ratio: int | None = Field(None, ge=1, description="Ratio of the small KVs instead of the model's.")
    prefill_mode: str | None = Field(
        None, description="What prefill sees of earlier chunks: exact, recent-N, high-memory or bounded-N."
    )
    compressor: str | None = Field(
        None,
        description="How KVs are made fewer where the model does not do it: stride, pool, snap, value-norm, keydiff or "
        "infinipot.",
    )
    reload: int | None = Field(None, ge=0, description="Chunks re-loaded by default instead of the model's number.")

    store: str = Field(
        default_factory=_default_store, description="memory://, disk:PATH, redis://HOST or rediss://HOST."
    )
    wait_for_store: float = Field(0.0, ge=0, description="Seconds to wait at the start for a store that is away.")
    store_cache_bytes: ByteSize | None = Field(
        None, ge=0, description="Host memory before the store; default 1GiB before a Redis, else none."
    )
    kv_dtype: Literal["auto", "int8"] = Field("auto", description="Detailed KVs as the model makes them, or as int8.")
    store_quota_bytes: ByteSize = Field(ByteSize(20 * 10**9), ge=0, description="Least recently used videos go above.")
    keep_video: bool = Field(True, description="Keep the uploaded files' bytes in the store.")
    gpu_kv_budget: ByteSize | None = Field(
        None,
        ge=1,
        description="Room for small KVs on the device; default 2GiB, on a GPU an eighth of what is free if more.",
    )
    gpu_low_kv_budget: ByteSize | None = Field(
        None,
        ge=0,
        description="Room on a GPU for the detailed KVs that were re-loaded last; default as --gpu-kv-budget's.",
    )
    gpu_prefetch_budget: ByteSize = Field(
        ByteSize(2**29), ge=0, description="Room on a GPU for detailed KVs that are read ahead; 0: none are."
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: Names = Field((), description="Keys that clients must send; each key sees only its own files.")
    cors_origin: Names = Field((), description="Origins that browsers may call from.")
    keep_alive_s: float = Field(10.0, gt=0, description="Silence in a stream before a keep-alive comment.")
    drain_s: float = Field(
        30.0, ge=0, description="How long running answers may finish after Ctrl-C or SIGTERM; a second one ends them."
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field("info", description="Least severe log.")

    max_queue: int = Field(64, ge=1, description="Requests that may wait; more are refused with 429.")
    max_batch: int = Field(16, ge=1, description="Requests decoded together.")
    max_concurrent_prefills: int = Field(2, ge=1, description="Videos decoded and prefilled at the same time.")
    max_tokens: int = Field(1024, ge=1, description="Most tokens of one answer.")
    prefill_share: float = Field(
        0.4, gt=0, lt=1, description="Of the engine's time, the part that uploads get at most while answers run."
    )

    max_upload_bytes: ByteSize = Field(ByteSize(4 * 2**30), ge=1, description="Largest uploaded file.")
    max_inline_bytes: ByteSize = Field(ByteSize(64 * 2**20), ge=1, description="Largest video inside a chat message.")
    max_videos: int = Field(4, ge=1, description="Most different videos in one request.")
    max_images: int = Field(8, ge=0, description="Most images in one request.")
    max_image_bytes: ByteSize = Field(ByteSize(20 * 2**20), ge=1, description="Largest image inside a chat message.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Largest image, width times height.")
    max_duration_s: float = Field(4 * 3600.0, gt=0, description="Longest video; a model's own limit may be lower.")
    max_pixels: int = Field(4096 * 2304, ge=1, description="Largest frame, width times height.")
    max_frames: int = Field(20_000, ge=1, description="Most frames sampled from one video.")
    fps_max: float = Field(8.0, gt=0, description="Highest sampling rate a client may ask for.")
    decode_memory_bytes: ByteSize = Field(ByteSize(3 * 2**30), ge=1, description="Memory to decode one video.")
    decode_processes: int | None = Field(None, ge=1, description="Decoders of one video; default one a core.")
    decode_timeout_s: float | None = Field(None, gt=0, description="Longest decoding; default 60 s + twice the video.")

    allowed_local_media_path: Path | None = Field(None, description="file:// URLs are read below this folder only.")
    allowed_media_domains: Names = Field((), description="http(s) URLs are fetched from these hosts only.")
    fetch_timeout_s: float = Field(120.0, gt=0, description="Longest that fetching one such URL may take.")

    @field_validator("api_key", "cors_origin", "allowed_media_domains", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if info.field_name != "api_key":  # which may hold a comma, where it is an option of its own
            parts = [part for each in parts for part in str(each).split(",")]
        if any(not str(part).strip() for part in parts):
            raise ValueError("an empty entry in the list")
        return tuple(str(part).strip() for part in parts)

    @field_validator("allowed_media_domains")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST.fullmatch(host):
                raise ValueError(f"a domain is the whole name of a host, such as media.example.com, not {host!r}")
        return tuple(host.lower() for host in value)

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(key.isascii() and key.isprintable() for key in value):
            raise ValueError("a key is made of printable ASCII characters")
        return value

    @field_validator("prefill_mode")
    @classmethod
    def _known_mode(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"exact|high-memory|(recent|bounded)-[1-9]\d*", value):
            raise ValueError(f"must be exact, recent-N, high-memory or bounded-N, such as recent-2, not {value!r}")
        return value

    @field_validator("allowed_local_media_path")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"no such folder: {value}")
        return value

    @model_validator(mode="after")
    def _ratios(self) -> Settings:
        if self.low_ratio is not None and self.high_ratio is not None and self.low_ratio > self.high_ratio:
            raise ValueError("low_ratio must not exceed high_ratio")
        return self


_SIZES = frozenset(
    name for name, field in Settings.model_fields.items() if ByteSize in (field.annotation, *get_args(field.annotation))
)


def load_settings(**options: Any) -> Settings:
    """Settings from ``options`` (None means not given), then the environment, then the defaults.

    Raises SettingsError, also for ``X2L_`` variables that mean nothing.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"unknown setting {name}")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        source = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
        message = first["msg"].removeprefix("Value error, ")
        if name in _SIZES:
            message = f"must be a size such as 512MiB, not {str(first['input'])!r}"
        raise SettingsError(f"bad setting{f' {source}' if name else ''}: {message}") from None
