"""Keys and tenants, health, the playground, CORS, and curl."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask


def test_every_response_has_an_id_of_its_own(live: Live, client: openai.OpenAI, file_id: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ask(file_id), max_tokens=1)
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().choices
    ids = {httpx.get(live.url + path).headers["x-request-id"] for path in ("/health", "/", "/nothing", "/v1/models")}
    assert len(ids) == 4


def test_models(live: Live, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.object, model.max_model_len) == ("model", live.backend.model.spec.max_positions)


def test_the_model_goes_by_the_name_that_it_is_given(serve: Serve) -> None:
    with serve(served_model_name="org/mine") as live, live.client() as client:
        assert [model.id for model in client.models.list()] == [client.models.retrieve("org/mine").id] == ["org/mine"]
        messages = [{"role": "user", "content": "Hello"}]
        assert client.chat.completions.create(model="org/mine", messages=messages, max_tokens=1).model == "org/mine"
        with pytest.raises(openai.NotFoundError, match="org/mine"):
            client.chat.completions.create(model=MODEL, messages=messages)


def test_health_ready_metrics_and_docs(live: Live) -> None:
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{live.url}/ready").status_code == 200
    for path in ("/", "/health", "/ready"):
        head = httpx.head(live.url + path)
        assert (head.status_code, head.content) == (200, b"")
    metrics = httpx.get(f"{live.url}/metrics").text
    assert "x2l_requests_in_flight" in metrics and "_created" not in metrics
    assert httpx.get(f"{live.url}/docs").status_code == 200
    described = httpx.get(f"{live.url}/openapi.json").json()
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert [name for name, field in fields.items() if "description" not in field] == []
    paths = described["paths"]
    assert {"/v1/files", "/v1/chat/completions", "/v1/files/{file_id}/events"} <= paths.keys()


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/chat/completions", {"json": {"model": MODEL}}, 400),
        ("POST", "/v1/chat/completions", {"json": {"model": "other", "messages": ask("file-0")}}, 404),
        ("POST", "/v1/files", {"data": {"purpose": "vision"}}, 400),
        ("GET", "/v1/files", {"params": {"limit": "many"}}, 400),
        ("GET", "/v1/files/{file_id}/chunks/{index}/thumbnail", {}, 404),
        ("GET", "/v1/files/{file_id}/content", {"headers": {"range": "bytes=999999999-"}}, 416),
        ("POST", "/v1/files/{file_id}/relevance", {"json": {"question": "?" * 4_000_000}}, 413),
        ("GET", "/v1/uploads/{upload_id}", {}, 404),
        ("GET", "/v1/models/{model_id}", {}, 404),
    ],
)
def test_refusals_are_as_described(
    live: Live, file_id: str, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()
    schemas = described["components"]["schemas"]
    names = {"file_id": file_id, "index": 99, "upload_id": "upload_0", "model_id": "other"}
    reply = httpx.request(method, live.url + path.format(**names), **options)
    assert reply.status_code == status
    assert reply.json().keys() == schemas["ErrorReply"]["properties"].keys()
    assert reply.json()["error"].keys() == schemas["ErrorDetails"]["properties"].keys()
    replies = described["paths"][path][method.lower()]["responses"]
    assert replies[str(status)]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorReply"}


def test_an_answer_is_as_described(live: Live, file_id: str) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()
    content = described["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content.keys() == {"application/json", "text/event-stream"}

    def check(value: Any, schema: dict[str, Any]) -> None:
        kinds = schema.get("anyOf", [schema])
        if value is None:
            assert any(kind.get("type") == "null" for kind in kinds)
            return
        (kind,) = (kind for kind in kinds if kind.get("type") != "null")
        if "$ref" in kind:
            kind = described["components"]["schemas"][kind["$ref"].rpartition("/")[2]]
        if isinstance(value, dict):
            assert set(kind.get("required", ())) <= value.keys() <= kind["properties"].keys()
            for name in value:
                check(value[name], kind["properties"][name])
        elif isinstance(value, list):
            for item in value:
                check(item, kind["items"])

    question: dict[str, Any] = {"model": MODEL, "messages": ask(file_id), "max_tokens": 1}
    check(httpx.post(f"{live.url}/v1/chat/completions", json=question).json(), content["application/json"]["schema"])
    question |= {"stream": True, "stream_options": {"include_usage": True}}
    events = httpx.post(f"{live.url}/v1/chat/completions", json=question).text.split("\n\n")[:-2]
    assert len(events) > 2
    for event in events:
        check(json.loads(event.removeprefix("data: ")), content["text/event-stream"]["schema"])


def test_the_parts_of_a_message_are_described(live: Live) -> None:
    schemas = httpx.get(f"{live.url}/openapi.json").json()["components"]["schemas"]
    (parts,) = (kind for kind in schemas["Message"]["properties"]["content"]["anyOf"] if kind["type"] == "array")
    names = [part["$ref"].rpartition("/")[2] for part in parts["items"]["anyOf"]]
    kinds = {schemas[name]["properties"]["type"]["const"] for name in names}
    assert kinds == {"text", "file", "video_url", "video", "image_url"}
    assert "file_id" in schemas["VideoReference"]["properties"]


@pytest.mark.parametrize(
    "path", ["/v1/files/{file_id}/events", "/v1/files/{file_id}/chunks/0/thumbnail", "/v1/files/{file_id}/content"]
)
def test_answers_that_are_no_json_are_described_as_such(live: Live, file_id: str, path: str) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()
    sent = httpx.get(live.url + path.format(file_id=file_id)).headers["content-type"].partition(";")[0]
    (told,) = described["paths"][path.replace("/0/", "/{index}/")]["get"]["responses"]["200"]["content"]
    assert sent == told or (told == "video/*" and sent.startswith("video/"))


def test_nothing_is_described_that_is_never_sent(live: Live) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()
    assert "securitySchemes" not in described["components"]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    assert not [name for name in described["components"]["schemas"] if "ValidationError" in name]


def test_the_playground_is_complete_and_self_contained(live: Live) -> None:
    page = httpx.get(live.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for asset in ("/playground/app.js", "/playground/style.css"):
        assert asset in page.text
        assert httpx.get(live.url + asset).status_code == 200
    script = httpx.get(f"{live.url}/playground/app.js").text
    assert "innerHTML" not in script
    assert "http://" not in page.text + script and "https://" not in page.text + script


def test_keys_open_and_tenants_do_not_see_each_other(serve: Serve, video: Path) -> None:
    with serve(api_key=("first", "second")) as live:
        for path in ("/health", "/ready", "/", "/playground/app.js"):
            assert httpx.get(live.url + path).status_code == 200
        for path in ("/v1/files", "/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing"):
            assert httpx.get(live.url + path).status_code == 401
        described = httpx.get(f"{live.url}/openapi.json", headers={"authorization": "Bearer first"}).json()
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                guarded = httpx.request(method, live.url + path).status_code == 401
                assert guarded == ("401" in operation["responses"]), path
                asked = operation.get("security", [])
                assert asked == [{"HTTPBearer": []}] * (guarded and path.startswith("/v1/")), path
        assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        for header in ("Bearer wrong", "Bearer", "Basic first", "first", "Bearer first x"):
            reply = httpx.get(f"{live.url}/v1/files", headers={"authorization": header})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        first, second = live.client("first"), live.client("second")
        with first, second:
            file = first.files.create(file=video, purpose="user_data")
            first.files.wait_for_processing(file.id, poll_interval=0.1)
            assert list(second.files.list()) == []
            for call in (second.files.retrieve, second.files.delete, second.files.content):
                with pytest.raises(openai.NotFoundError):
                    call(file.id)
            with pytest.raises(openai.NotFoundError):
                second.chat.completions.create(model=MODEL, messages=ask(file.id))
            assert first.chat.completions.create(model=MODEL, messages=ask(file.id), max_tokens=1).choices
            own = second.files.create(file=video, purpose="user_data")
            assert own.status == "uploaded"  # it got nothing of the first one's KVs
            assert [known.id for known in first.files.list()] == [file.id]


def test_cors_only_where_asked_for(serve: Serve, live: Live) -> None:
    asking = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{live.url}/v1/models", headers=asking).headers
    with serve(cors_origin=("https://app.example",), api_key=("key",)) as open_live:
        preflight = httpx.options(f"{open_live.url}/v1/files", headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.options(f"{open_live.url}/v1/files", headers=asking | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def test_curl_all_the_way(live: Live, video: Path) -> None:
    files = f"{live.url}/v1/files"
    form = ("purpose=user_data", f"file=@{video}", "expires_after[anchor]=created_at", "expires_after[seconds]=600")
    file = json.loads(curl(files, *itertools.chain(*(("-F", field) for field in form))))
    assert file["status"] in ("uploaded", "processed")
    assert '"processed"' in curl("-N", f"{files}/{file['id']}/events")
    body = json.dumps({"model": MODEL, "messages": ask(file["id"]), "max_tokens": 3, "stream": True})
    answer = curl("-N", f"{live.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    assert answer.endswith("data: [DONE]\n\n")
    assert json.loads(curl("-X", "DELETE", f"{files}/{file['id']}"))["deleted"] is True


def test_curl_gets_a_413_though_it_is_still_sending(live: Live, tmp_path: Path) -> None:
    big = tmp_path / "big.mp4"
    big.write_bytes(b"x" * 30_000_000)
    for header in ("Expect:", "Expect: 100-continue"):
        reply = curl(f"{live.url}/v1/files", "-H", header, "-F", "purpose=user_data", "-F", f"file=@{big}")
        assert json.loads(reply)["error"]["code"] == "file_too_large"
