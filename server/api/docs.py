"""``/docs``: Swagger UI, with nothing fetched from elsewhere; and what ``/openapi.json`` tells beside the routes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import TypeAdapter
from starlette.responses import FileResponse, Response

from server.api.errors import COMPONENT, ApiError
from server.api.reply import ChatCompletionChunk
from server.api.schemas import ContentPart, Message

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


def install(app: FastAPI) -> None:
    """Has ``/openapi.json`` also describe the parts of a message, which are read one by one, and the events of an
    answer."""
    of_routes = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = of_routes()["components"]["schemas"]
            adapters: list[tuple[str, Any, TypeAdapter[Any]]] = [
                ("part", "validation", TypeAdapter(ContentPart)),
                ("chunk", "serialization", TypeAdapter(ChatCompletionChunk)),
            ]
            made, found = TypeAdapter.json_schemas(adapters, ref_template=COMPONENT)
            for name, schema in found["$defs"].items():
                schemas.setdefault(name, schema)
            content = schemas[Message.__name__]["properties"]["content"]["anyOf"]
            (parts,) = (kind for kind in content if kind["type"] == "array")
            parts["items"] = made["part", "validation"]
        return of_routes()

    app.openapi = openapi  # type: ignore[method-assign]


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
