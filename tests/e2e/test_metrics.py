"""What ``/metrics`` tells of questions and uploads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import httpx
import openai
from live import MODEL, Serve, ask
from prometheus_client.parser import text_string_to_metric_families
from until import until

from server.engine.metrics import Ending


def read(url: str, headers: Mapping[str, str] | None = None) -> dict[str, float]:
    """Values by name, with the labels' values behind it."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", headers=headers).text)
    samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def test_everything_that_was_done_is_counted(serve: Serve, video: Path, tmp_path: Path) -> None:
    with serve(store=f"disk:{tmp_path}/store", store_cache_bytes=10**9) as live, live.client() as client:
        idle = read(live.url)
        file = client.files.create(file=video, purpose="user_data")
        file = client.files.wait_for_processing(file.id, poll_interval=0.1)
        ready = read(live.url)
        assert ready["x2l_prefilled_chunks_total"] == ready["x2l_prefill_chunk_seconds_count"] == 3
        assert ready["x2l_prefill_chunk_seconds_sum"] > 0
        assert ready["x2l_resident_videos"] == 1 and idle["x2l_resident_bytes"] == 0
        assert file.video["bytes"]["high"] < ready["x2l_resident_bytes"] < ready["x2l_resident_budget_bytes"]

        cold, warm = (question(client, file.id) for _ in range(2))
        after = read(live.url)
    assert cold.x2l["reload_bytes"] == warm.x2l["reload_bytes"] > 0
    for tier, answer in (("disk", cold), ("memory", warm)):  # the second reads what the first has left in memory
        assert after[f"x2l_reload_bytes_total {tier}"] == answer.x2l["reload_bytes"]
        assert after[f"x2l_reload_seconds_count {tier}"] == 1
        assert after[f"x2l_reload_seconds_sum {tier}"] > 0
    tokens = sum(answer.usage.completion_tokens for answer in (cold, warm))
    assert after["x2l_generated_tokens_total"] == tokens
    assert after["x2l_requests_total ok"] == 2 and after["x2l_degraded_total"] == 0
    prompts = [answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens for answer in (cold, warm)]
    assert after["x2l_prompt_tokens_total"] == sum(prompts) > 0
    assert after["x2l_queue_seconds_count"] == after["x2l_first_token_seconds_count"] == 2
    assert 0 < after["x2l_queue_seconds_sum"] < after["x2l_first_token_seconds_sum"]
    for phase in ("score", "prefill", "decode"):
        assert after[f"x2l_{phase}_seconds_count"] == 2
        assert after[f"x2l_{phase}_seconds_sum"] > 0
    passes = [after[f"x2l_forward_seconds_count {kind}"] for kind in ("prompt", "decode")]
    assert min(passes) >= 2
    assert after["x2l_batch_size_count"] == after["x2l_batch_size_sum"] == sum(passes)  # one at a time
    for gauge in ("x2l_requests_in_flight", "x2l_requests_running", "x2l_requests_waiting"):
        assert after[gauge] == 0


def test_every_request_is_counted_by_how_it_ended(serve: Serve, video: Path) -> None:
    with serve(api_key=("a",), max_batch=1, max_queue=1, endless=True, keep_alive_s=0.05) as live:
        headers = {"authorization": "Bearer a"}
        http = httpx.Client(base_url=live.url, headers=headers, timeout=60)
        with http, live.client("a") as client:
            file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "4"})

            def chat(**fields: object) -> int:
                body = {"model": MODEL, "messages": ask(file.id), "max_tokens": 2} | fields
                return http.post("/v1/chat/completions", json=body).status_code

            def ended() -> dict[str, float]:
                found = {
                    name.removeprefix("x2l_requests_total "): value
                    for name, value in read(live.url, headers).items()
                    if name.startswith("x2l_requests_total ")
                }
                assert found.keys() == set(get_args(Ending))
                return {ending: value for ending, value in found.items() if value}

            assert ended() == {}
            waiting = {"model": MODEL, "messages": ask(file.id), "stream": True}
            first, second = (http.stream("POST", "/v1/chat/completions", json=waiting) for _ in range(2))
            with first as one, second as two:
                lines = one.iter_lines(), two.iter_lines()
                assert all(map(next, lines))
                assert chat() == 429
                client.files.delete(file.id)  # an error amid both
                assert all("file_not_found" in "".join(rest) for rest in lines)
            assert ended() == {"busy": 1, "not_found": 2}

            file = client.files.create(file=video, purpose="user_data")
            client.files.wait_for_processing(file.id, poll_interval=0.1)
            assert [chat(), chat(stream=True), chat(n=2), chat(model=5), chat(model="x")] == [200, 200, 400, 400, 404]
            assert chat(messages=ask("file-none")) == 404
            assert httpx.post(f"{live.url}/v1/chat/completions", json={}).status_code == 401
            assert http.get("/v1/chat/completions").status_code == 405
            relevance = f"/v1/files/{file.id}/relevance"
            assert http.post(relevance, json={"question": "When?"}).status_code == 200
            assert http.post(relevance, json={"question": ""}).status_code == 400
            before = {"ok": 3, "rejected": 4, "not_found": 4, "busy": 1}
            assert ended() == before

            with http.stream("POST", "/v1/chat/completions", json=waiting | {"messages": ask(file.id)}) as stream:
                next(stream.iter_lines())
            until(lambda: ended() == before | {"cancelled": 1})
            live.backend.engine.close()
            assert chat() == 503
            assert ended() == before | {"cancelled": 1, "unavailable": 1}


def question(client: openai.OpenAI, file_id: str) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model=MODEL, messages=ask(file_id), extra_body={"x2l": {"chunks": [0, 2]}})
