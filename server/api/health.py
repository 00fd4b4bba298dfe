"""Liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from server.api.context import Context
from server.api.errors import replies

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"description": "Not yet, or no more."}})
async def ready(services: Context) -> Response:
    """200 while questions can be answered."""
    if services.engine.ready and not services.stopping:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "stopping" if services.stopping else "starting"}, 503)


@router.get("/metrics", response_class=Response, responses=replies(401, "default", media_types=["text/plain"]))
async def metrics(services: Context) -> Response:
    """The engine's gauges for Prometheus."""
    return Response(generate_latest(services.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)
