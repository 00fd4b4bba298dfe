"""Refusals in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.api.schemas import ErrorDetails, ErrorReply

NO_RETRY = {"x-should-retry": "false"}
COMPONENT = "#/components/schemas/{model}"
"""Where /openapi.json has a schema."""

_REPLIES: dict[int | str, str] = {
    400: "The request is at fault; `param` names the field, if one is to blame.",
    401: "The API key is missing or incorrect.",
    404: "There is no such model, file, chunk or upload, or its bytes were not kept.",
    409: "Another request is ending this upload; try again after `Retry-After`.",
    408: "The body stopped arriving.",
    413: "The body or the file is too large, or would never fit into the store's quota.",
    415: "The body is encoded.",
    416: "The range lies outside the file.",
    429: "Too many requests are waiting; try again after `Retry-After`.",
    503: "The server is stopping, or lacks its store or memory; try again after `Retry-After`.",
    507: "The store or the disk is full.",
    "default": "Any other refusal or failure.",
}

_MUST_BE = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
}
"""By pydantic's type of complaint; all others begin with a "should" of its own."""


class ApiError(HTTPException):
    """An error reply. An HTTPException, because FastAPI lets only those pass while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The reply's JSON object."""
        details = ErrorDetails(message=self.detail, type=error_type(self.status_code), param=self.param, code=self.code)
        return ErrorReply(error=details).model_dump()

    def response(self) -> JSONResponse:
        """The whole reply."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def file_not_found(file_id: str, *, param: str = "file_id") -> ApiError:
    """A 404 for a file that this client does not have."""
    return ApiError(404, f"No such file: {file_id[:80]!r}", param=param, code="file_not_found")


def replies(
    *statuses: int | str, model: type | None = None, media_types: Sequence[str] = (), events: str | None = None
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that refuses with these statuses, and answers with a ``model``, in ``media_types``
    that its response class does not tell, or as a stream of ``events``, by the name of their schema. ``default`` stands
    for all other statuses, and keeps FastAPI from adding its own 422, which is never sent."""
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": _REPLIES[status]} for status in statuses
    }
    answer: dict[str, Any] = {"model": model} if model else {}
    content: dict[str, Any] = {
        name: {"schema": {"type": "string"} | ({} if name.startswith("text/") else {"format": "binary"})}
        for name in media_types
    }
    if events:
        content["text/event-stream"] = {"schema": {"$ref": COMPONENT.format(model=events)}}
    if content:
        answer["content"] = content
    return ({200: answer} if answer else {}) | refusals


def error_type(status: int) -> str:
    """OpenAI's ``type`` for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    if status == 503:
        return "service_unavailable_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def param_name(location: Sequence[int | str]) -> str | None:
    """A pydantic location as a field path: ``messages[0].content``."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or None


def from_validation(error: ValidationError | RequestValidationError, *, under: str = "") -> ApiError:
    """The 400 for the most deeply located complaint (of a union's branches, the one that came furthest)."""
    first = max(error.errors(), key=lambda entry: len(entry["loc"]))
    location = [part for part in first["loc"] if not _is_branch(part)]
    if first["type"] == "json_invalid":
        return bad_request("The body is not valid JSON", code="invalid_json")
    if location == ["body"] and first["type"] != "string_unicode":
        return bad_request("The body must be a JSON object, sent as application/json", code="invalid_body")
    location = location[location[:1] in (["body"], ["path"], ["query"]) :]
    param = param_name(location)
    if under:
        param = f"{under}.{param}" if param else under
    if first["type"] == "missing":
        return bad_request(f"{param or 'A field'} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return bad_request(f"{param} is unknown", param=param, code="unknown_parameter")
    if first["type"] == "too_short":
        return bad_request(f"{param} is empty", param=param)
    if first["type"] == "value_error":  # words of a validator of ours, which say it all
        return bad_request(str(first["ctx"]["error"]), param=param)
    return bad_request(f"{param or 'The body'}{_complaint(first)}", param=param)


def _complaint(entry: Mapping[str, Any]) -> str:
    """What is wrong, to be read behind the field's name."""
    if entry["type"] in _MUST_BE:
        return f" must be {_MUST_BE[entry['type']]}"
    if entry["type"] == "string_unicode":
        return " holds a lone surrogate (half of a UTF-16 pair), which is no character"
    message = str(entry["msg"])
    _, should, rest = message.partition(" should ")
    return f" must {rest}" if should else f": {message}"


def _is_branch(part: int | str) -> bool:
    # pydantic puts the branch of a union into the location: "str", "list[str]", "VideoReference".
    return isinstance(part, str) and (part == "str" or "[" in part or part[:1].isupper())


def install(app: FastAPI) -> None:
    """Makes every refusal of the framework an OpenAI error."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path[:200]}"
        if error.status_code == 404:
            known = ApiError(404, f"Unknown route: {where}", code="unknown_url")
        elif error.status_code == 405:
            known = ApiError(405, f"Method not allowed: {where}", code="method_not_allowed", headers=error.headers)
        elif error.status_code == 400:
            known = bad_request("The body could not be read", code="invalid_body")
        else:
            known = ApiError(error.status_code, HTTPStatus(error.status_code).phrase, headers=error.headers)
        return known.response()
