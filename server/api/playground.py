"""The playground: one plain page that uploads, asks and shows the evidence."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from server.api.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent.parent / "playground"
_ASSETS = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@router.head("/")
@router.get("/")
async def page() -> Response:
    """The page."""
    return FileResponse(_FOLDER / "index.html", media_type="text/html", headers=_HEADERS)


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    """Its script, style and icon."""
    if name not in _ASSETS:
        raise ApiError(404, "No such asset", code="unknown_url")
    return FileResponse(_FOLDER / name, media_type=_ASSETS[name], headers=_HEADERS)
