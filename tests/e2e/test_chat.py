from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask


def complete(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **({"max_tokens": 8} | options))


def x2l(reply: Any) -> dict[str, Any]:
    return reply.to_dict()["x2l"]


def test_an_answer_with_evidence(client: openai.OpenAI, file_id: str) -> None:
    reply = complete(client, ask(file_id))
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    found = x2l(reply)
    assert found["file_id"] == file_id
    assert len(found["scores"]) == 3
    scores = [item["score"] for item in found["evidence"]]
    assert scores == sorted(scores, reverse=True)
    for item in found["evidence"]:
        assert item["score"] == found["scores"][item["chunk"]]
        assert 0 <= item["start_s"] < item["end_s"] <= 96.2
    assert found["degraded"] is False
    assert set(found["timings_ms"]) == {"score", "reload", "prefill", "decode"}
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == found["kv_tokens"]["mixed"] < usage.prompt_tokens
    assert 1 <= usage.completion_tokens <= 8


def test_the_dials(client: openai.OpenAI, file_id: str) -> None:
    def cost(**dials: Any) -> dict[str, Any]:
        return x2l(complete(client, ask(file_id), max_tokens=1, extra_body={"x2l": dials}))

    def chosen(reply: dict[str, Any]) -> set[int]:
        return {item["chunk"] for item in reply["evidence"]}

    low, high = cost(mode="low"), cost(mode="high")
    assert low["kv_tokens"]["mixed"] == low["kv_tokens"]["low"] > low["kv_tokens"]["high"]
    assert high["kv_tokens"]["mixed"] == high["kv_tokens"]["high"]
    assert (chosen(low), chosen(high)) == ({0, 1, 2}, set())
    assert low["reload_bytes"] > 0 == high["reload_bytes"]
    assert cost(reload=0)["kv_tokens"] == high["kv_tokens"]
    assert cost(reload=99)["kv_tokens"] == low["kv_tokens"]
    assert len(chosen(cost(reload=2))) == 2
    assert chosen(cost(chunks=[2, 0])) == {0, 2}
    assert chosen(cost(reload=3, start_s=65, end_s=72)) == {2}
    assert cost(mode="auto")["kv_tokens"] == cost()["kv_tokens"]
    for budget in (high["kv_tokens"]["mixed"], cost(reload=1)["kv_tokens"]["mixed"], 10**6):
        assert cost(budget_tokens=budget)["kv_tokens"]["mixed"] <= budget


def test_streamed_is_the_same_as_whole(client: openai.OpenAI, file_id: str) -> None:
    whole = complete(client, ask(file_id), max_tokens=24)
    chunks = list(complete(client, ask(file_id), max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *answer, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in answer] == [None] * (len(answer) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in answer)
    assert (usage.choices, usage.usage) == ([], whole.usage)
    last = answer[-1].to_dict()["x2l"]
    assert {**last, "timings_ms": None} == {**x2l(whole), "timings_ms": None}
    assert not any("x2l" in chunk.to_dict() for chunk in answer[:-1])


def test_the_stream_on_the_wire(live: Live, file_id: str) -> None:
    body = {"model": MODEL, "messages": ask(file_id), "max_tokens": 4, "stream": True}
    reply = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    datas = [json.loads(event.removeprefix("data: ")) for event in events[:-1] if not event.startswith(":")]
    assert all("usage" not in data for data in datas)
    assert datas[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_many_turns_with_the_video_in_the_first(client: openai.OpenAI, file_id: str, video: Path) -> None:
    exam = json.loads(video.with_suffix(".json").read_text())["questions"]
    code, time = (next(one for one in exam if one["type"] == kind) for kind in ("code", "time"))
    messages = [{"role": "system", "content": "Be brief."}, *ask(file_id, code["question"])]
    first = complete(client, messages)
    messages.append(first.choices[0].message.to_dict())
    messages.append({"role": "user", "content": time["question"]})
    second = complete(client, messages)
    assert first.choices[0].message.content == code["answer"]
    assert second.choices[0].message.content == time["answer"]
    assert x2l(second)["file_id"] == file_id


def test_without_a_video(client: openai.OpenAI) -> None:
    reply = complete(client, [{"role": "user", "content": "What code is on the red star?"}])
    assert "x2l" not in reply.to_dict()
    assert reply.usage.prompt_tokens > 0
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [{"role": "user", "content": "Hello"}], extra_body={"x2l": {"reload": 1}})
    assert refused.value.param == "x2l"


def test_sampling(client: openai.OpenAI, file_id: str) -> None:
    def text(**options: Any) -> str:
        return complete(client, ask(file_id), max_tokens=12, **options).choices[0].message.content

    assert text() == text() == text(temperature=0)
    assert text(temperature=1.5, seed=5) == text(temperature=1.5, seed=5)
    assert text(temperature=2, extra_body={"top_k": 1}) == text()
    greedy = text()
    if len(greedy) > 1:
        stopped = complete(client, ask(file_id), max_tokens=12, stop=greedy[1]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == (greedy.split(greedy[1])[0], "stop")


def test_defaults_and_harmless_fields_are_accepted(client: openai.OpenAI, file_id: str) -> None:
    plain = complete(client, ask(file_id)).choices[0].message.content
    harmless = {
        "chat_template_kwargs": {"enable_thinking": False},
        "mm_processor_kwargs": {},
        "reasoning_effort": "high",
        "verbosity": "low",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
    }
    usual = {"n": 1, "presence_penalty": 0, "logprobs": False, "user": "me", "store": False, "metadata": {"a": "b"}}
    reply = complete(client, ask(file_id), **usual, extra_body=harmless)
    assert reply.choices[0].message.content == plain


def test_a_file_that_is_still_prefilling_is_waited_for(client: openai.OpenAI, live: Live, video: Path) -> None:
    file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "6"})
    body = {"model": MODEL, "messages": ask(file.id), "max_tokens": 2, "stream": True}
    reply = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=120)
    assert reply.text.endswith("data: [DONE]\n\n")
    assert ": keep-alive\n\n" in reply.text
    assert complete(client, ask(file.id)).usage.prompt_tokens_details.cached_tokens > 0
    client.files.delete(file.id)


def test_inline_video_is_kept_and_found_again(client: openai.OpenAI, live: Live, video: Path) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()

    def file_of(part: dict[str, Any], **options: Any) -> str:
        content = [part, {"type": "text", "text": "What is it?"}]
        return x2l(complete(client, [{"role": "user", "content": content}], extra_body=options or None))["file_id"]

    first = file_of({"type": "video_url", "video_url": {"url": url}})
    done = live.backend.engine.metrics.chunks._value.get()
    assert file_of({"type": "file", "file": {"file_data": url, "filename": "a.mp4"}}) == first
    assert file_of({"type": "video", "video": {"url": url}}) == first
    assert live.backend.engine.metrics.chunks._value.get() == done  # nothing was prefilled again
    listed = client.files.retrieve(first)
    assert 86_000 < listed.expires_at - time.time() <= 86_400
    sampled = file_of({"type": "video", "video": url}, media_io_kwargs={"video": {"num_frames": 8, "fps": -1}})
    assert client.files.retrieve(sampled).to_dict()["video"]["num_frames"] == 8
    for file_id in (first, sampled):
        client.files.delete(file_id)


def test_local_files_only_below_the_allowed_folder(serve: Serve, video: Path, tmp_path: Path) -> None:
    (tmp_path / "way out.mp4").symlink_to("/etc/hostname")
    (tmp_path / "in.mp4").write_bytes(video.read_bytes())
    with serve(allowed_local_media_path=tmp_path) as live, live.client() as client:

        def status(url: str) -> int:
            content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}]
            try:
                complete(client, [{"role": "user", "content": content}])
            except openai.APIStatusError as error:
                assert "hostname" not in error.message
                return error.status_code
            return 200

        assert status(f"file://{tmp_path}/in.mp4") == 200
        assert status(f"file://{tmp_path}/way%20out.mp4") == 400
        assert status(f"file://{tmp_path}/../../../../etc/hostname") == 400
        assert status("file:///etc/hostname") == 400
        assert status(f"file://{tmp_path}/none.mp4") == 400
        assert status(f"file://elsewhere{tmp_path}/in.mp4") == 400
        assert status(f"file://{tmp_path}") == 400


def test_ignore_eos_goes_on_to_max_tokens(client: openai.OpenAI, file_id: str) -> None:
    usual = complete(client, ask(file_id), max_tokens=40)
    on = complete(client, ask(file_id), max_tokens=40, extra_body={"ignore_eos": True})
    assert usual.choices[0].finish_reason == "stop" and usual.usage.completion_tokens < 40
    assert on.choices[0].finish_reason == "length" and on.usage.completion_tokens == 40
    assert on.choices[0].message.content.startswith(usual.choices[0].message.content)


def test_a_client_that_goes_away_frees_its_slot(serve: Serve, video: Path) -> None:
    with serve(endless=True, max_batch=1, max_queue=1, max_tokens=3000) as live, live.client() as client:
        file = client.files.create(file=video, purpose="user_data")
        client.files.wait_for_processing(file.id, poll_interval=0.1)
        body = {"model": MODEL, "messages": ask(file.id), "stream": True}
        url = f"{live.url}/v1/chat/completions"
        for stream in (True, False):
            for _ in range(4):  # more than slot and queue hold
                with httpx.Client() as leaver:
                    try:
                        with leaver.stream("POST", url, json=body | {"stream": stream}, timeout=0.3) as response:
                            next(response.iter_lines())
                    except httpx.ReadTimeout:
                        pass
            assert idle(live)
        complete(client, ask(file.id))


def test_a_client_that_does_not_read_holds_nobody_up(serve: Serve, video: Path) -> None:
    with serve(endless=True, max_batch=1, max_tokens=1000) as live, live.client() as client:
        file = client.files.create(file=video, purpose="user_data")
        client.files.wait_for_processing(file.id, poll_interval=0.1)
        body = json.dumps({"model": MODEL, "messages": ask(file.id), "stream": True}).encode()
        address = httpx.URL(live.url)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # much less than the answer
            slow.settimeout(60)
            slow.connect((address.host, address.port))
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x2l\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            while in_flight(live) == 0:
                time.sleep(0.01)
            complete(client, ask(file.id))  # the only slot is free for it once the other's answer is drawn
            assert idle(live)
            received = b"".join(iter(lambda: slow.recv(1 << 16), b""))
        assert received.count(b'"content":"') >= 800 and b'"finish_reason":"length"' in received
        assert received.rstrip(b"0\r\n").endswith(b"data: [DONE]")


def in_flight(live: Live) -> float | None:
    return live.backend.engine.metrics.registry.get_sample_value("x2l_requests_in_flight")


def idle(live: Live) -> bool:
    """Whether the engine has nothing in flight, within a few seconds."""
    for _ in range(1000):
        if in_flight(live) == 0:
            return True
        time.sleep(0.01)
    return False


def test_a_full_queue_is_a_429_with_retry_after(serve: Serve, video: Path) -> None:
    async def burst(url: str, file_id: str) -> list[httpx.Response]:
        body = {"model": MODEL, "messages": ask(file_id), "max_tokens": 4}
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(8)))

    with serve(max_batch=1, max_queue=1) as live, live.client() as client:
        file = client.files.create(file=video, purpose="user_data", extra_body={"fps": "4"})
        replies = asyncio.run(burst(live.url, file.id))  # they wait for the prefill, so the queue fills for sure
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(refused) == 6
    assert all(reply.headers["retry-after"] == "1" for reply in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"


def test_eight_at_once_answer_as_if_alone(live: Live, client: openai.OpenAI, file_id: str) -> None:
    questions = [f"What code is on the {colour} star?" for colour in ("red", "blue", "green", "pink")] * 2
    alone = [complete(client, ask(file_id, question)).choices[0].message.content for question in questions]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as many:
            replies = await asyncio.gather(
                *(
                    many.chat.completions.create(model=MODEL, messages=ask(file_id, question), max_tokens=8)
                    for question in questions
                )
            )
        return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(together()) == alone
