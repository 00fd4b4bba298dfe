"""What pydantic complains about, in words that name the field."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.testclient import TestClient

from server.api import errors


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    body: int = Field(0, ge=0)

    @field_validator("body")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("An odd number of bodies")
        return value


class Outer(BaseModel):
    inner: Inner = Inner()
    many: list[int] = Field([1], min_length=1)


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    errors.install(app)

    @app.post("/things/{index}")
    def thing(index: int, outer: Outer, limit: int = 1) -> None:
        """Takes one of each."""

    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "body", "code", "param", "told"),
    [
        ("/things/x", {}, "invalid_value", "index", "index must be a whole number"),
        ("/things/1?limit=x", {}, "invalid_value", "limit", "limit must be a whole number"),
        ("/things/1", {"inner": {"body": "x"}}, "invalid_value", "inner.body", "inner.body must be a whole number"),
        ("/things/1", {"inner": {"bodi": 1}}, "unknown_parameter", "inner.bodi", "inner.bodi is unknown"),
        ("/things/1", {"inner": 5}, "invalid_value", "inner", "inner must be an object"),
        (
            "/things/1",
            {"inner": {"body": -1}},
            "invalid_value",
            "inner.body",
            "body must be greater than or equal to 0",
        ),
        ("/things/1", {"inner": {"body": 3}}, "invalid_value", "inner.body", "An odd number of bodies"),
        ("/things/1", {"many": []}, "invalid_value", "many", "many is empty"),
        ("/things/1", [], "invalid_body", None, "must be a JSON object"),
        ("/things/1", None, "invalid_body", None, "must be a JSON object"),
        ("/nothing", {}, "unknown_url", None, "POST /nothing"),
    ],
)
def test_a_refusal_names_the_field(
    client: TestClient, path: str, body: object, code: str, param: str | None, told: str
) -> None:
    reply = client.post(path, json=body)
    error = reply.json()["error"]
    assert reply.status_code == (404 if code == "unknown_url" else 400)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert told in error["message"]


@pytest.mark.parametrize(("content", "code"), [(b"", "invalid_body"), (b"{", "invalid_json"), (b"a=1", "invalid_json")])
def test_a_body_that_is_no_json(client: TestClient, content: bytes, code: str) -> None:
    reply: httpx.Response = client.post("/things/1", content=content, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)


def test_a_form_instead_of_json(client: TestClient) -> None:
    assert client.post("/things/1", data={"many": "1"}).json()["error"]["code"] == "invalid_body"
