"""Puts the server together: settings in, store, model, engine and HTTP application out. Nothing else assembles."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from fastapi import FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from kvstore.base import Store
from kvstore.errors import StoreError
from kvstore.open import open_store
from server.api import chat, docs, errors, failures, files, health, models, playground, uploads
from server.api.context import Services
from server.api.middleware import Auth, BodyLimit, CountRequests, RequestId
from server.config import Settings
from server.engine.engine import Engine
from server.engine.fit import check_budgets, default_kept_nbytes
from server.engine.metrics import EngineMetrics
from server.engine.options import EngineOptions
from server.engine.pinned import kept_buffers
from server.engine.uploads import Uploads
from server.models.base import VideoModel
from server.models.registry import choose_device, load_model
from server.spool import Spool
from server.video.reader import VideoLimits

_log = logging.getLogger("x2l")

_JSON_OVERHEAD_BYTES = 1 << 20
_FILE_ROUTES = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_SWEEP_UPLOADS_S = 60.0


@dataclass(frozen=True)
class Backend:
    """What answers questions: the model, the store, the engine over both, and the folder for files on their way in."""

    model: VideoModel
    store: Store
    engine: Engine
    spool: Spool

    def close(self, drain_s: float = 0.0) -> None:
        """Closes engine and store. May be called again."""
        self.engine.close(drain_s)
        self.store.close()
        self.spool.close()


def open_backend(settings: Settings) -> Backend:
    """Opens the store, loads the model and starts the engine. Raises ValueError or StoreError for settings that cannot
    be met, and for a store that cannot be read; then nothing stays open."""
    store = open_store(
        settings.store,
        cache_nbytes=settings.store_cache_bytes,
        cache_buffers=partial(kept_buffers, choose_device(settings.device)),
        wait_s=settings.wait_for_store,
    )
    try:
        model = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            low_ratio=settings.low_ratio,
            high_ratio=settings.high_ratio,
            prefill_mode=settings.prefill_mode,
            compressor=settings.compressor,
        )
    except BaseException:
        store.close()
        raise
    if model.device.type == "cuda" and not os.environ.get("OMP_NUM_THREADS"):
        # Beside a GPU the CPU moves frames and KVs, on several threads of ours. Torch would give each a pool of as many
        # threads as there are cores, in the way of the one that tells the GPU what to do.
        torch.set_num_threads(1)
    spool = Spool()
    options = _engine_options(settings, spool, model)
    backend = Backend(model, store, Engine(model, store, options), spool)
    try:
        check_budgets(model, options)
        backend.engine.start()
    except BaseException:
        backend.close()
        raise
    return backend


def create_app(settings: Settings, backend: Backend) -> FastAPI:
    """The ASGI application. Its lifespan drains the engine in the end; the store stays open."""
    engine = backend.engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        unfinished = Uploads(backend.store, engine.library)
        services = Services(settings, engine, unfinished, backend.model.spec, backend.spool.folder)
        app.state.services = services
        sweeper = asyncio.create_task(_sweep(unfinished))
        try:
            yield
        finally:
            services.stopping = True
            sweeper.cancel()
            await asyncio.to_thread(engine.close, settings.drain_s)

    app = FastAPI(
        title="Video-X²L server",
        version=version("video-x2l-server"),
        lifespan=lifespan,
        docs_url=None,
        middleware=_middleware(settings, engine.metrics),
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    errors.install(app)
    failures.install(app)
    docs.install(app)
    # Middleware looks at the keys; this tells of them.
    guard = [Security(HTTPBearer(auto_error=False, description="An API key."))] if settings.api_key else []
    for name, routes in (("chat", chat), ("files", files), ("uploads", uploads), ("models", models)):
        app.include_router(routes.router, tags=[name], dependencies=guard, responses=errors.replies(401, "default"))
    app.include_router(health.router, tags=["health"])
    for routes in (playground, docs):
        app.include_router(routes.router)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


async def _sweep(unfinished: Uploads) -> None:
    while True:
        try:
            await asyncio.to_thread(unfinished.sweep)
        except StoreError as error:
            _log.warning("expired uploads could not be removed yet: %s", error)
        await asyncio.sleep(_SWEEP_UPLOADS_S)


def _middleware(settings: Settings, metrics: EngineMetrics) -> list[Middleware]:
    stack = [
        Middleware(CountRequests, metrics=metrics),
        Middleware(Auth, keys=settings.api_key),
        Middleware(
            BodyLimit,
            max_bytes=settings.max_inline_bytes * 4 // 3 + _JSON_OVERHEAD_BYTES,  # base64
            exempt=_FILE_ROUTES,
        ),
    ]
    if settings.cors_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        stack.insert(0, cors)
    return [Middleware(RequestId), *stack]


def _engine_options(settings: Settings, spool: Spool, model: VideoModel) -> EngineOptions:
    high_nbytes, low_nbytes = settings.gpu_kv_budget, settings.gpu_low_kv_budget
    return EngineOptions(
        spool=spool.folder,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_tokens=settings.max_tokens,
        max_concurrent_prefills=settings.max_concurrent_prefills,
        prefill_share=settings.prefill_share,
        default_reload=settings.reload,
        keep_video=settings.keep_video,
        low_precision="exact" if settings.kv_dtype == "auto" else settings.kv_dtype,
        store_quota_bytes=settings.store_quota_bytes,
        resident_nbytes=default_kept_nbytes(model.device, low_nbytes) if high_nbytes is None else high_nbytes,
        shared_low_nbytes=default_kept_nbytes(model.device, high_nbytes) if low_nbytes is None else low_nbytes,
        prefetch_nbytes=settings.gpu_prefetch_budget,
        limits=VideoLimits(
            max_nbytes=settings.max_upload_bytes,
            max_duration_s=settings.max_duration_s,
            max_pixels=settings.max_pixels,
            max_frames=settings.max_frames,
            wall_clock_s=settings.decode_timeout_s,
            memory_nbytes=settings.decode_memory_bytes,
            max_processes=settings.decode_processes,
        ),
    )
