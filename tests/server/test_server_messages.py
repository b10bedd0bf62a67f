"""/v1/messages through Anthropic's client: text, streams, counts, caching words and errors in Anthropic's shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine

ASK: dict[str, Any] = {
    "model": "fake",
    "max_tokens": 40,
    "messages": [{"role": "user", "content": "Where is the cat?"}],
}


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, without retries."""
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_whole_message(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(**ASK)
    [block] = answer.content
    assert block.type == "text" and len(block.text) > 20
    assert (answer.role, answer.type, answer.stop_reason, answer.id[:4]) == (
        "assistant",
        "message",
        "max_tokens",
        "msg-",
    )
    assert answer.usage.output_tokens == 40 and answer.usage.cache_read_input_tokens == 0
    counted = claude.messages.count_tokens(model="fake", messages=ASK["messages"])
    assert counted.input_tokens == answer.usage.input_tokens


def test_a_streamed_message_is_the_whole_one(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**ASK)
    with claude.messages.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 40)
    raw = [event.type for event in claude.messages.create(**ASK, stream=True)]
    assert raw[:2] == ["message_start", "content_block_start"]
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(raw[2:-3]) == {"content_block_delta"}
    assert "text" in kinds


def test_blocks_system_and_cache_control(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    long = {"type": "text", "text": "A long document. " * 100, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    turns = [
        {"role": "user", "content": [long, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        {"role": "user", "content": "More?"},
    ]
    first = claude.messages.create(
        **ASK | {"messages": turns}, system=[{"type": "text", "text": "Be brief."}], metadata={"user_id": "u1"}
    )
    assert engine.hints[-1].ttl == 3600 and engine.hints[-1].session == "/u1" and engine.hints[-1].marks
    second = claude.messages.create(**ASK | {"messages": turns}, system="Be brief.")
    assert second.usage.cache_read_input_tokens >= 128
    total = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == total


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    text = claude.messages.create(**ASK).content[0].text
    stop = text[10:14]
    for stream in (False, True):
        if stream:
            with claude.messages.stream(**ASK, stop_sequences=[stop]) as events:
                answer = events.get_final_message()
        else:
            answer = claude.messages.create(**ASK, stop_sequences=[stop])
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        assert answer.content[0].text == text[: text.index(stop)]


def test_a_last_turn_of_the_assistant_is_continued(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    turns = [*ASK["messages"], {"role": "assistant", "content": "The cat is"}]
    claude.messages.create(**ASK | {"messages": turns})
    assert engine.tokenizer.decode(engine.prompts[-1], hide_special=False).endswith("</think>The cat is")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "from 1 to"),
        ({"temperature": "x"}, "must be a number"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role must be user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0] is of type 'image'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text must be a string",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "txt": 1}]}]}, "Unknown field 'txt'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "belongs to the assistant"),
        ({"messages": [{"role": "user", "content": "x" * 50000}]}, "more than 4095 tokens"),
        ({"system": 3}, "system must be a string or a list"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema must be an object"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "only custom tools"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be"),
        ({"thinking": {"type": "on"}}, "thinking.type must be"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"max_token": 5}, "Did you mean 'max_tokens'?"),
        ({"n": 2}, "Unknown field 'n'"),
    ],
)
def test_refusals_have_anthropics_shape(http: httpx.Client, change: dict[str, Any], sentence: str) -> None:
    answer = http.post("/v1/messages", json=ASK | change)
    body = answer.json()
    assert answer.status_code == 400 and body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert sentence in body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]


def test_the_client_raises_its_own_errors(claude: anthropic.Anthropic, server: Server, engine: FakeEngine) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**ASK | {"model": "other"})
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(**ASK, stop_sequences=["x"] * 20)
    engine.fail_after = 3
    with pytest.raises(anthropic.InternalServerError):
        claude.messages.create(**ASK)
    with pytest.raises(anthropic.APIStatusError, match="not finite"), claude.messages.stream(**ASK) as stream:
        stream.get_final_message()
    engine.fail_after = None
    server.app.state.server.draining = True
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(**ASK)
    assert caught.value.status_code == 503 and caught.value.body["error"]["type"] == "overloaded_error"


def test_silence_is_filled_with_pings(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.prefill_delay = 0.7
    kinds = [event.type for event in claude.messages.create(**ASK, stream=True)]
    assert kinds[0] in ("ping", "message_start") and "message_stop" in kinds
    wait_for(lambda: not engine.live)
