"""``/docs``: Swagger UI, with nothing fetched from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from server.api.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(str(files("fastapi_offline"))) / "static"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_HEADERS = {
    # Swagger UI writes style attributes and draws its icons from data: URLs; its scripts are files.
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Video-X²L server: HTTP interface</title>
<link rel="icon" href="/playground/icon.svg">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'


@router.get("/docs")
async def page() -> Response:
    """The page."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)


@router.get("/docs/start.js")
async def start() -> Response:
    """What the page runs."""
    return Response(_START, media_type="text/javascript", headers=_HEADERS)


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    """Swagger UI itself."""
    if name not in _ASSETS:
        raise ApiError(404, "No such asset", code="unknown_url")
    return FileResponse(_FOLDER / name, media_type=_ASSETS[name], headers=_HEADERS)
