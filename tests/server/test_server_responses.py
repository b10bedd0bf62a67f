"""/v1/responses through OpenAI's client: items, events, conversations that go on from a stored answer."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from triptych.errors import NotFound
from triptych.server.store import ResponseStore

ASK: dict[str, Any] = {"model": "fake", "input": "Where is the cat?", "max_output_tokens": 30}


def test_a_whole_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    assert answer.output_text and answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.object, answer.instructions, answer.metadata) == ("response", "Be brief.", {"a": "b"})
    assert answer.usage.output_tokens == 30 and answer.usage.input_tokens_details.cached_tokens == 0
    [item] = answer.output
    assert (item.type, item.role, item.content[0].type) == ("message", "assistant", "output_text")


def test_events_are_numbered_and_add_up(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added")
    ]
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    with client.responses.stream(**ASK) as stream:
        assert "response.output_text.delta" in [event.type for event in stream]


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.responses.create(**ASK | {"input": "A long question. " * 60})
    second = client.responses.create(**ASK | {"input": "And?"}, previous_response_id=first.id)
    items = [
        {"role": "user", "content": "A long question. " * 60},
        {"role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
        {"role": "user", "content": [{"type": "input_text", "text": "And?"}]},
    ]
    same = client.responses.create(**ASK | {"input": items}, store=False)
    assert second.previous_response_id == first.id
    assert same.usage.input_tokens == second.usage.input_tokens and same.output_text == second.output_text
    assert second.usage.input_tokens_details.cached_tokens >= 128
    third = client.responses.create(**ASK | {"input": "So?"}, previous_response_id=second.id, instructions="Be brief.")
    assert third.usage.input_tokens > second.usage.input_tokens + 30
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(same.id)


def test_retrieve_items_and_delete(client: openai.OpenAI) -> None:
    streamed = list(client.responses.create(**ASK, stream=True))[-1].response
    found = client.responses.retrieve(streamed.id)
    assert found.output_text == streamed.output_text and found.usage == streamed.usage
    [item] = client.responses.input_items.list(streamed.id)
    assert item.content[0].text == ASK["input"]
    client.responses.delete(streamed.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(streamed.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASK, previous_response_id=streamed.id)


def test_logprobs_come_where_they_are_asked_for(client: openai.OpenAI) -> None:
    answer = client.responses.create(**ASK, top_logprobs=2, include=["message.output_text.logprobs"])
    assert len(answer.output[0].content[0].logprobs) == 30
    events = list(client.responses.create(**ASK, top_logprobs=2, include=["message.output_text.logprobs"], stream=True))
    assert sum(len(e.logprobs) for e in events if e.type == "response.output_text.delta") == 30


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"input": None}, "input", "non-empty string or list"),
        ({"input": [{"type": "image"}]}, "input[0].type", "only message, function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "only text is read"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "must be user"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "must be a string"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "only 'function' is known"),
        ({"tool_choice": 3}, "tool_choice", "must be auto, none"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"previous_response_id": 3}, "previous_response_id", "must be a string"),
        ({"include": ["file_search_call.results"]}, "include[0]", "asks for what is not there"),
        ({"max_tokens": 3}, "max_tokens", "Did you mean 'max_output_tokens'?"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "text, json_object or json_schema"),
        ({"metadata": 1}, "metadata", "must be an object"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort", "Did you mean 'effort'?"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "Unknown field"),
    ],
)
def test_refusals(http: httpx.Client, change: dict[str, Any], param: str, sentence: str) -> None:
    answer = http.post("/v1/responses", json=ASK | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and sentence in error["message"]


def test_a_stream_that_fails_ends_with_an_error_event(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 4
    *_, last = client.responses.create(**ASK, stream=True)
    assert (last.type, last.message) == ("error", "The logits of this request are not finite.")
    with pytest.raises(openai.InternalServerError):
        client.responses.create(**ASK)


def test_the_store_is_bounded_shares_messages_and_keeps_tenants_apart() -> None:
    store = ResponseStore(20_000)
    message = {"role": "user", "content": "x" * 1000}
    before = None
    for i in range(10):
        store.put("a", f"r{i}", response=b"{}", items=b"[]", before=before, new=[message])
        before = store.get("a", f"r{i}")
    assert len(store) == 10 and 15_000 < store.bytes_used < 20_000  # not ten times five messages
    assert len(before.conversation()) == 10
    with pytest.raises(NotFound):
        store.get("b", "r1")
    store.put("b", "mine", response=b"{}", items=b"[]", before=None, new=[message] * 4)
    assert store.bytes_used <= 20_000
    with pytest.raises(NotFound):
        store.get("a", "r0")
    for i in range(10):
        try:
            store.delete("a", f"r{i}")
        except NotFound:
            continue
    store.delete("b", "mine")
    assert store.bytes_used == 0 and len(store) == 0
    none = ResponseStore(0)
    none.put("a", "r", response=b"{}", items=b"[]", before=None, new=[])
    assert len(none) == 0 == none.bytes_used
