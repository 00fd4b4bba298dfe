from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.api.errors import ApiError, from_validation
from server.api.messages import Conversation, parse_messages
from server.api.schemas import ChatRequest, Dials
from server.models.base import Turn


def parse(*messages: Any) -> Conversation:
    return parse_messages(ChatRequest.model_validate({"model": "m", "messages": list(messages)}).messages)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "why?"}
STORED = {"type": "file", "file": {"file_id": "file-1"}}


@pytest.mark.parametrize(
    ("part", "location"),
    [
        (STORED, "file-1"),
        ({"type": "file", "file": {"file_data": "data:video/mp4;base64,AA==", "filename": "a.mp4"}}, "data:"),
        ({"type": "video_url", "video_url": {"url": "file-1"}}, "file-1"),
        ({"type": "video_url", "video_url": {"url": "https://a/b.mp4", "detail": "low"}}, "https://a/b.mp4"),
        ({"type": "video", "video": "file:///a.mp4"}, "file:///a.mp4"),
        ({"type": "video", "video": {"url": "data:video/mp4;base64,AA=="}}, "data:"),
        ({"type": "video", "video": {"file_id": "file-1"}}, "file-1"),
    ],
)
def test_every_way_to_name_a_video(part: dict[str, Any], location: str) -> None:
    conversation = parse(user(part, TEXT))
    (video,) = conversation.videos
    assert video.location.startswith(location)
    assert conversation.turns == (Turn("user", "why?"),)


def test_turns_keep_their_order_and_the_video_may_stand_early() -> None:
    conversation = parse(
        {"role": "developer", "content": "Be brief."},
        user({"type": "text", "text": "before"}, STORED, {"type": "text", "text": "after"}),
        {"role": "assistant", "content": "K7X", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "And then?"},
    )
    assert conversation.turns == (
        Turn("system", "Be brief."),
        Turn("user", "before\nafter"),
        Turn("assistant", "K7X"),
        Turn("user", "And then?"),
    )


def test_an_answer_without_content_is_an_empty_one() -> None:
    conversation = parse(user(STORED, TEXT), {"role": "assistant", "content": None}, user(TEXT))
    assert conversation.turns == (Turn("user", "why?"), Turn("user", "why?"))


def test_the_same_video_twice_is_one_video() -> None:
    again = parse(user(STORED, TEXT), {"role": "assistant", "content": "a"}, user(STORED, TEXT))
    assert [video.location for video in again.videos] == ["file-1"]


def test_videos_and_images_keep_their_order() -> None:
    def shown(name: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}", "detail": "low"}}

    conversation = parse(
        user(shown("A"), {"type": "video", "video": "file-2"}, TEXT, STORED),
        {"role": "assistant", "content": "a"},
        user(shown("B"), shown("A"), {"type": "video", "video": "file-2"}, {"type": "video", "video": "file-3"}, TEXT),
    )
    assert [video.location for video in conversation.videos] == ["file-2", "file-1", "file-3"]
    assert [image.location[-1] for image in conversation.images] == ["A", "B", "A"]
    assert conversation.images[1].param == "messages[2].content[0].image_url.url"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([user(STORED)], "messages"),
        ([user(STORED, {"type": "text", "text": "  "})], "messages"),
        ([user(TEXT), {"role": "assistant", "content": "so"}], "messages"),
        ([user(TEXT, {"type": "image_url", "image_url": {"url": "x"}})], "messages[0].content[1].image_url.url"),
        ([user(TEXT, {"type": "image_url", "image_url": {"url": "file-1"}})], "messages[0].content[1].image_url.url"),
        ([user(TEXT, {"type": "image_url", "image_url": {}})], "messages[0].content[1].image_url.url"),
        ([user(TEXT, {"type": "image_url", "image_url": "data:"})], "messages[0].content[1].image_url"),
        (
            [user(TEXT, {"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}})],
            "messages[0].content[1].image_url.detail",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, user(TEXT)],
            "messages[0].content[0]",
        ),
        ([user(TEXT, {"type": "input_audio"})], "messages[0].content[1].type"),
        ([user(TEXT, {"type": ["text"]})], "messages[0].content[1].type"),
        ([user({"type": "text", "text": 7})], "messages[0].content[0].text"),
        ([user(TEXT, {"type": "file"})], "messages[0].content[1].file"),
        ([user(TEXT, {"type": "file", "file": {}})], "messages[0].content[1].file"),
        ([user(TEXT, {"type": "file", "file": {"file_data": "AAAA"}})], "messages[0].content[1].file.file_data"),
        ([user(TEXT, {"type": "video_url", "video_url": {"url": "ftp://a"}})], "messages[0].content[1].video_url.url"),
        ([{"role": "system", "content": [STORED]}, user(TEXT)], "messages[0].content[0]"),
        ([{"role": "system", "content": None}, user(TEXT)], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}, user(TEXT)], "messages[0].tool_calls"),
    ],
)
def test_refusals_name_the_field(messages: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(*messages)
    assert (refused.value.status_code, refused.value.param) == (400, param)


def test_an_id_that_is_none_is_not_found() -> None:
    with pytest.raises(ApiError) as refused:
        parse(user(TEXT, {"type": "file", "file": {"file_id": "video.mp4"}}))
    assert refused.value.status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"x2l": {"reload": -1}}, "x2l.reload"),
        ({"x2l": {"reload": 1, "mode": "low"}}, "x2l"),
        ({"x2l": {"relaod": 1}}, "x2l.relaod"),
        ({"x2l": {"chunks": [1.5]}}, "x2l.chunks[0]"),
    ],
)
def test_a_wrong_body_is_a_400_that_names_the_field(body: dict[str, Any], param: str) -> None:
    good = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(ValidationError) as wrong:
        ChatRequest.model_validate(good | body)
    refusal = from_validation(wrong.value)
    assert (refusal.status_code, refusal.param) == (400, param)


def test_one_dial_beside_a_time_range_is_fine() -> None:
    assert Dials.model_validate({"reload": 0, "start_s": 1, "end_s": 2.5}).start_s == 1
