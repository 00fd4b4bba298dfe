"""What routes need besides their request: the services behind them and whom they act for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request

from server.api.errors import ApiError, bad_request
from server.config import Settings
from server.engine.engine import Engine
from server.engine.uploads import Uploads
from server.models.base import ModelSpec
from server.video.reader import Sampling

_IMAGES_AT_ONCE = 2


@dataclass
class Services:
    """One per application. ``spool`` is the folder for files on their way in; ``stopping`` ends endless streams, and
    ``image_slots`` bounds the memory of large images."""

    settings: Settings
    engine: Engine
    uploads: Uploads
    spec: ModelSpec
    spool: Path
    image_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_IMAGES_AT_ONCE))
    stopping: bool = False
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.served_model_name or self.spec.name

    def check_open(self) -> None:
        """Raises ApiError (503) where nothing new is taken in any more."""
        if not self.engine.ready or self.stopping:
            raise ApiError(503, "The server is stopping", code="shutting_down", headers={"retry-after": "5"})

    def sampling(self, fps: float | None, max_frames: int | None, *, fps_param: str, frames_param: str) -> Sampling:
        """How a client wants a video sampled, within the ceilings. Raises ApiError (400)."""
        if fps is not None and not 0 < fps <= self.settings.fps_max:
            raise bad_request(f"{fps_param} must be above 0 and at most {self.settings.fps_max:g}", param=fps_param)
        ceiling = self.settings.max_frames
        if max_frames is not None and not 1 <= max_frames <= ceiling:
            raise bad_request(f"{frames_param} must be between 1 and {ceiling}", param=frames_param)
        return Sampling(fps=fps or self.spec.fps, max_frames=max_frames)


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def _tenant(request: Request) -> str:
    return cast(str, request.state.tenant)


Context = Annotated[Services, Depends(_services)]
Tenant = Annotated[str, Depends(_tenant)]
